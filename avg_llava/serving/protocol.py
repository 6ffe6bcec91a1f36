"""Request and response types: OpenAI's chat completions, extended by this model's budget and routing.

The OpenAPI schema is generated from these classes. Unsupported options are either unknown fields, which are rejected,
or fields that accept only the supported value, so that no option is silently ignored.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse


class ApiError(Exception):
    """An error with the HTTP status, machine-readable code, message and additional headers of its response."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers

    def content(self) -> dict[str, Any]:
        """Returns the response body in OpenAI's format."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        # A message may quote a field name with a lone surrogate, which UTF-8 cannot encode.
        message = str(self).encode("utf-8", "backslashreplace").decode()
        return {"error": {"message": message, "type": kind, "param": None, "code": self.code}}

    def response(self) -> JSONResponse:
        """Returns the response."""
        return JSONResponse(self.content(), self.status, self.headers)


def invalid_request(message: str) -> ApiError:
    """Returns the error of a request that is invalid (status 400)."""
    return ApiError(400, "invalid_request", message)


def _check_encodable(text: str) -> str:
    """Rejects lone surrogates, which JSON can express but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text contains a lone surrogate") from error
    return text


Text = Annotated[str, AfterValidator(_check_encodable)]


class _Strict(BaseModel):
    """Base of request types: no unknown fields, no type coercion."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A text part of a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(_Strict):
    """The URL of an image."""

    url: Text = Field(min_length=1, description="data:image/...;base64,..., or http(s) if the server allows it")
    detail: Literal["auto"] = Field(
        "auto", description="only auto: use granularity, token_cost or max_visual_tokens instead"
    )


class ImagePart(_Strict):
    """An image part of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class SystemMessage(_Strict):
    """System prompt; only allowed as the first message."""

    role: Literal["system", "developer"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]


class UserMessage(_Strict):
    """A user turn: text and images."""

    role: Literal["user"]
    content: Text | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(min_length=1)]


class AssistantMessage(_Strict):
    """An assistant turn, as returned by an earlier response."""

    role: Literal["assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    """Options of a streamed response."""

    include_usage: bool = Field(False, description="send a final chunk with the token usage")


class ChatRequest(_Strict):
    """A chat completion request."""

    model: Text = Field(description="the name of the model on this server")
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="maximum number of generated tokens")
    max_completion_tokens: int | None = Field(None, ge=1, description="OpenAI's newer name of max_tokens")
    temperature: float | None = Field(None, ge=0, le=2, description="0, the default, decodes greedily")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63, description="makes sampling reproducible")
    stop: (
        Annotated[Text, Field(min_length=1)]
        | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=4)]
        | None
    ) = Field(None, description="stop strings; not part of the answer")
    stream: bool | None = Field(None, description="stream the answer as server-sent events")
    stream_options: StreamOptions | None = None
    granularity: int | None = Field(None, description="visual tokens per crop; without it the router chooses the level")
    token_cost: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="router penalty in nats per doubling of visual tokens"
    )
    max_visual_tokens: int | None = Field(None, ge=1, description="limit on the total number of visual tokens")
    n: Literal[1] | None = Field(None, description="this server generates one answer per request")
    logprobs: Literal[False] | None = Field(None, description="this server does not return log-probabilities")
    presence_penalty: float | None = Field(None, ge=0, le=0, description="this server does not support penalties")
    frequency_penalty: float | None = Field(None, ge=0, le=0, description="this server does not support penalties")
    user: Text | None = Field(None, description="accepted and ignored")


class PromptTokensDetails(BaseModel):
    """Breakdown of the prompt tokens."""

    visual_tokens: int = Field(description="visual tokens in the prompt, newline tokens included")


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AnswerMessage(BaseModel):
    """The generated message."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """The single choice of a response."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The response to a request without `stream`."""

    granularity: list[int] = Field(description="visual tokens per crop, for each image of the request")
    router_probs: list[dict[str, float]] | None = Field(
        description="for each image, the router's probability of each level; null if the level was forced"
    )
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Unix time in seconds")
    model: str
    choices: list[Choice]
    usage: Usage


class Model(BaseModel):
    """A model on this server."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="start time of the server, Unix time in seconds")
    owned_by: Literal["avg-llava"] = "avg-llava"
    granularities: list[int] = Field(description="levels in visual tokens per crop, coarse to fine")


class ModelList(BaseModel):
    """The models on this server."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Readiness of the server."""

    status: Literal["ready", "draining"]


class ErrorDetails(BaseModel):
    """Details of an error."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: None = None
    code: str


class ErrorResponse(BaseModel):
    """Body of every response with a status of 400 or above."""

    error: ErrorDetails


ERRORS: dict[int, str] = {
    400: "The body is not JSON or violates the schema, or its images or budget are invalid.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body was not received in time.",
    413: "The body is too large.",
    429: "The queue is full; retry after the time in Retry-After.",
    500: "The model failed; see the server's log.",
    503: "The server is shutting down.",
    504: "The answer was not complete within the time limit.",
}
"""Error statuses and their descriptions in the OpenAPI schema."""
