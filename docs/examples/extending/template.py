"""The ChatML conversation format: every turn stands between `<|im_start|>` with its role and the tokenizer's EOS.

Once this file is imported, `data.template: chatml` selects it for training, and the trained model's processor uses it
for prompts. Any other processor uses it after `processor.chat_template = TEMPLATES["chatml"].jinja`.
"""

from avg_llava.model.templates import CONTENT_AS_TEXT, TEMPLATES, ConversationTemplate

CHATML = (
    "{%- for message in messages -%}\n"
    + CONTENT_AS_TEXT  # sets `content`
    + """\
  {{- '<|im_start|>' + message['role'] + '\\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- content + eos_token -}}{%- endgeneration -%}
  {%- else -%}
    {{- content + eos_token -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
)

TEMPLATES["chatml"] = ConversationTemplate(CHATML)
"""No `answer_separator`: answers are where `{% generation %}` says."""
