"""Golden E, F and G: losses at every level, feedback and router gradients, greedy answers."""

import pytest
import torch

from avg_llava.bench.plain_loop import sums_over_logits
from avg_llava.training.losses import answer_log_prob, ranking_loss, router_cross_entropy
from tests.parity.golden import golden

E, E_JSON = golden("E_stage3")
F, F_JSON = golden("F_stage4")
G, G_JSON = golden("G_generate")
LEVELS = [36, 72, 144, 288, 576]
IMAGES = ["w400x120", "w300x200"]


def _batch(batch_inputs, tensors, prefix, images):
    return batch_inputs(
        tensors[f"{prefix}input_ids"], images, tensors[f"{prefix}attention_mask"], tensors[f"{prefix}labels"]
    )


def test_stage3_losses(released_model, batch_inputs):
    inputs = _batch(batch_inputs, E, "", IMAGES)
    with torch.no_grad():
        losses = torch.stack([released_model(**inputs, granularity=level).loss for level in LEVELS])
    torch.testing.assert_close(losses, E["loss_per_granularity"], rtol=0, atol=1e-5)
    torch.testing.assert_close(losses.mean(), E["loss_total"], rtol=0, atol=1e-5)


def test_stage3_gradients(released_model, batch_inputs):
    """Norms of the mean loss's gradient, all parameters but the tower's, which the released code never trains."""
    inputs = _batch(batch_inputs, E, "", IMAGES)
    released_model.zero_grad()
    sum(released_model(**inputs, granularity=level).loss for level in LEVELS).div(len(LEVELS)).backward()
    renamed = {
        "model.image_newline": "model.image_newline",
        "model.mm_projector.0.weight": "model.multi_modal_projector.linear_1.weight",
        "model.mm_projector.2.weight": "model.multi_modal_projector.linear_2.weight",
        "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "model.layers.1.mlp.down_proj.weight": "model.language_model.layers.1.mlp.down_proj.weight",
        "model.layers.0.self_attn.q_proj.weight": "model.language_model.layers.0.self_attn.q_proj.weight",
    }
    for original, name in renamed.items():
        norm = released_model.get_parameter(name).grad.norm().item()
        assert norm == pytest.approx(E_JSON["grad_norms"][original], rel=1e-4), name
    released_model.zero_grad()


def _feedback(model, inputs):
    """(B, G) mean log-probability of the answer under every level."""
    columns = []
    with torch.no_grad():
        for level in LEVELS:
            output = model(**inputs, granularity=level)
            columns.append(answer_log_prob(*sums_over_logits(output.logits, output.labels), "mean"))
    return torch.stack(columns, 1)


def _router_logits(model, inputs):
    """Router logits as in training: the instruction is what the labels leave out. Dropout is off, as recorded."""
    with torch.no_grad():
        features = model.encode_images(inputs["pixel_values"], inputs["image_sizes"])
    return model.route(features, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])


def test_stage4(released_model, batch_inputs):
    inputs = _batch(batch_inputs, F, "batch2/", IMAGES)
    log_probs = _feedback(released_model, inputs)
    torch.testing.assert_close(-log_probs, F["batch2/llm_loss"], rtol=1e-4, atol=0)
    assert torch.equal(log_probs.argsort(1, descending=True), F["batch2/sort_indices"])

    released_model.zero_grad()
    logits = _router_logits(released_model, inputs)
    torch.testing.assert_close(logits, F["batch2/router_logits"], rtol=1e-4, atol=1e-5)
    rank = ranking_loss(logits, log_probs, variant="released")
    cross_entropy = router_cross_entropy(logits, log_probs)
    total = rank + 0.1 * cross_entropy
    for name, loss in {"rank": rank, "ce": cross_entropy, "total": total}.items():
        torch.testing.assert_close(loss, F[f"batch2/{name}"], rtol=1e-4, atol=0)
    paper = ranking_loss(logits, log_probs, variant="paper").item()
    assert paper == pytest.approx(F_JSON["batch2"]["REFERENCE_paper_sum_over_pairs_mean_over_batch"], rel=1e-4)

    total.backward()
    for name, parameter in released_model.model.router.named_parameters():
        expected = F[f"batch2/grad/{name}"]
        # The golden voter sums to 5e-6, so the gradient of the last bias is rounding noise; hence the absolute part.
        atol = max(1e-4 * expected.abs().max().item(), 1e-6)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    released_model.zero_grad()


def test_stage4_sample_beside_a_text_only_one(released_model, batch_inputs):
    """The image sample of a mixed batch; the released code also trains on the text-only one, which we leave out."""
    inputs = _batch(batch_inputs, F, "mixed_textonly/", ["w400x120"])
    torch.testing.assert_close(-_feedback(released_model, inputs), F["mixed_textonly/llm_loss"], rtol=1e-4, atol=0)
    with torch.no_grad():
        logits = _router_logits(released_model, inputs)
    torch.testing.assert_close(logits, F["mixed_textonly/router_logits"][:1], rtol=1e-4, atol=1e-5)


def test_answer_tokens_fill_empty_slots(released_model, batch_inputs):
    """Released behaviour: with fewer instruction tokens than slots, the answer leaks into the router."""
    differences = []
    for version in "AB":
        ids, labels = F[f"leak/input_ids_{version}"], F[f"leak/labels_{version}"]
        inputs = batch_inputs(ids, ["w100x60"], labels=labels)
        with torch.no_grad():
            logits = _router_logits(released_model, inputs)
        torch.testing.assert_close(logits, F[f"leak/router_logits_{version}"], rtol=0, atol=1e-4)
        differences.append(logits)
    gap = (differences[0] - differences[1]).abs().max().item()
    assert gap == pytest.approx(F_JSON["answer_leak"]["same_instruction_different_answer_logit_diff"], rel=1e-2)


@pytest.mark.parametrize("granularity", ["router", *map(str, LEVELS)])
@pytest.mark.parametrize("image", ["sq192", "w300x200", "w400x120", "t110x410", "w100x60"])
def test_greedy_ids(released_model, batch_inputs, image, granularity):
    inputs = batch_inputs(G[f"{image}/prompt_ids"], [image])
    level = None if granularity == "router" else int(granularity)
    output = released_model(**inputs, granularity=level)
    key = f"{image}/{granularity}"
    about = G_JSON["cases"][image][granularity]
    assert output.logits.shape[1] == about["prefill_len"]
    torch.testing.assert_close(output.logits[0, -1], G[f"{key}/first_step_logits"], rtol=0, atol=1e-4)
    if level is None:
        torch.testing.assert_close(output.router_logits[0], G[f"{key}/router_logits"], rtol=0, atol=1e-5)
    ids = released_model.generate(**inputs, granularity=level, max_new_tokens=8, do_sample=False, eos_token_id=-1)
    assert ids[0].tolist() == G[f"{key}/ids"][1:].tolist()  # the recording puts BOS in front


def test_greedy_ids_of_a_left_padded_batch(released_model, batch_inputs):
    ids = G["batch2_left/prompt_ids"]
    inputs = batch_inputs(ids, ["sq192", "w400x120"], attention_mask=ids != 0)
    output = released_model(**inputs)
    assert output.granularity.tolist() == G_JSON["cases"]["batch2_left"]["chosen"]
    generated = released_model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=-1)
    assert torch.equal(generated, G["batch2_left/ids"][:, 1:])
