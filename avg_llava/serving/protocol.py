"""The server's language: OpenAI's chat completions, with this model's budget and routing as extra fields.

The classes are the OpenAPI schema as well. What the server cannot do is no field, or a field with the one value that it
can, so that nothing that is asked for is silently left out.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class ApiError(Exception):
    """A request that ends with an error.

    Args:
        status: HTTP status.
        code: What programs tell errors apart by.
        message: What people read.
        headers: Further headers of the response.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers

    def content(self) -> dict[str, Any]:
        """The body of the response, as OpenAI has it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        # Names of fields can hold half a character too, which no response can.
        message = str(self).encode("utf-8", "backslashreplace").decode()
        return {"error": {"message": message, "type": kind, "param": None, "code": self.code}}


def _whole_characters(text: str) -> str:
    """JSON can name half a character (a lone surrogate), which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text holds half a character (a lone surrogate)") from error
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]


class _Given(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Given):
    """Text of a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(_Given):
    """Where an image is."""

    url: Text = Field(min_length=1, description="data:image/...;base64,..., or http(s) where the server allows it")
    detail: Literal["auto"] = Field("auto", description="the router chooses; granularity and the like set a budget")


class ImagePart(_Given):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class SystemMessage(_Given):
    """What goes before a conversation; only as its first message."""

    role: Literal["system", "developer"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]


class UserMessage(_Given):
    """A turn of the user, with images where they stand."""

    role: Literal["user"]
    content: Text | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(min_length=1)]


class AssistantMessage(_Given):
    """A turn of the model, as an earlier response gave it."""

    role: Literal["assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Given):
    """How an answer is streamed."""

    include_usage: bool = Field(False, description="a last chunk with the usage")


class ChatRequest(_Given):
    """A conversation that the model goes on with."""

    model: Text = Field(description="the name under which the server has its model")
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="longest answer in tokens")
    max_completion_tokens: int | None = Field(None, ge=1, description="OpenAI's newer name of max_tokens")
    temperature: float | None = Field(None, ge=0, le=2, description="0, the default, takes the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63, description="the same draw each time, where temperature is above 0")
    stop: (
        Annotated[Text, Field(min_length=1)]
        | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=4)]
        | None
    ) = Field(None, description="texts at which the answer ends; they are not part of it")
    stream: bool | None = Field(None, description="tokens as they come, as server-sent events")
    stream_options: StreamOptions | None = None
    granularity: int | None = Field(None, description="visual tokens per crop; without it the router chooses")
    token_cost: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="the router's price in nats per doubling of visual tokens"
    )
    max_visual_tokens: int | None = Field(None, ge=1, description="limit on the visual tokens of all images together")
    n: Literal[1] | None = Field(None, description="this server gives one answer per request")
    logprobs: Literal[False] | None = Field(None, description="this server tells no log-probabilities")
    presence_penalty: float | None = Field(None, ge=0, le=0, description="this server has no penalties")
    frequency_penalty: float | None = Field(None, ge=0, le=0, description="this server has no penalties")
    user: Text | None = Field(None, description="taken, and not used")


class PromptTokensDetails(BaseModel):
    """What the prompt consisted of."""

    visual_tokens: int = Field(description="visual tokens that the language model saw, newlines included")


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Routing(BaseModel):
    """How the images' levels came about."""

    granularity: list[int] = Field(description="visual tokens per crop, for each image of the request")
    router_probs: list[dict[str, float]] | None = Field(
        description="for each image the router's probability of each level; null where it was not asked"
    )


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str


FinishReason = Literal["stop", "length"]


class Choice(BaseModel):
    """The answer."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: FinishReason


class ChatCompletion(Routing):
    """The response to a request that does not stream."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="seconds since 1970")
    model: str
    choices: list[Choice]
    usage: Usage


class Model(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="when the server was started, in seconds since 1970")
    owned_by: Literal["avg-llava"] = "avg-llava"
    granularities: list[int] = Field(description="its levels in visual tokens per crop, coarse to fine")


class ModelList(BaseModel):
    """The models that can be asked."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether the server takes requests."""

    status: Literal["ready", "draining"]


class ErrorDetails(BaseModel):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: None = None
    code: str


class ErrorResponse(BaseModel):
    """The body of every response with a status of 400 or more."""

    error: ErrorDetails


ERRORS: dict[int, str] = {
    400: "The body is no JSON or breaks the schema, or its images or budget cannot be used.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "The queue is full; Retry-After says when to come back.",
    500: "The model failed; the server's log says how.",
    503: "The server is shutting down.",
    504: "The answer took too long.",
}
"""Statuses of errors, and when they come."""

__all__ = [
    "ERRORS",
    "ApiError",
    "ChatCompletion",
    "ChatRequest",
    "ErrorResponse",
    "Health",
    "Message",
    "Model",
    "ModelList",
    "Usage",
]
