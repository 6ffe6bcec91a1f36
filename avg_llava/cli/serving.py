"""Commands that serve a model: to programs, and as a web page."""

import os
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes

from avg_llava.cli.options import FAILED, FINE, Command, ListenOptions, ModelOptions, command, unset
from avg_llava.serving.limits import Limits

_SHIPPED = Path(__file__).parent.parent / "mini" / "checkpoint"


@command("avg-llava serve --model runs/mini/stage4 --port 8000")
class Serve(Command):
    """Serves a model to OpenAI's clients: /v1/chat/completions, /v1/models, /health, /metrics."""

    loading: OmitArgPrefixes[ModelOptions]
    name: Annotated[str | None, unset("the folder's name")] = None
    """Name of the model in requests."""
    listening: OmitArgPrefixes[ListenOptions] = ListenOptions(port=8000)
    api_key_file: Annotated[Path | None, unset("none")] = None
    """File with the API key that clients must send."""
    limits: OmitArgPrefixes[Limits] = Limits()

    def run(self) -> int:
        from avg_llava.serving import server as serving

        api_key = None
        if self.api_key_file is not None:
            api_key = self.api_key_file.read_text("utf-8").strip()
            if not api_key or not api_key.isascii():
                raise ValueError(f"{self.api_key_file} must hold one line, the key, in ASCII")
        pipeline = self.loading.load()
        name = self.name or Path(self.loading.model).resolve().name
        server = serving.Server(pipeline.predictor, name, self.limits, api_key)

        def announce(address: str) -> None:
            print(f"{self.loading.model} at {address}", flush=True)

        fine = serving.serve(server, self.listening.host, self.listening.port, announce)
        return FINE if fine else FAILED


@command("avg-llava demo --model runs/mini/stage4 --port 7860")
class Demo(Command):
    """Serves a web page that answers questions about images and shows the router's choice."""

    loading: OmitArgPrefixes[ModelOptions] = ModelOptions(model=str(_SHIPPED))
    listening: OmitArgPrefixes[ListenOptions] = ListenOptions(port=7860)

    def run(self) -> int:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
        from avg_llava.serving.demo import serve_page, wait_for_signal

        pipeline = self.loading.load()
        with serve_page(pipeline.predictor, self.listening.host, self.listening.port) as address:
            print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
            wait_for_signal()
        return FINE
