"""Misuse of what tests and servers are made of."""

from mtpbatch import ChatMessage, EngineConfig, Watcher
from mtpbatch.server import create_app
from mtpbatch.testing import ScriptedBackend


class Deaf(Watcher):
    def stepped(self) -> None:  # expect error
        return


ScriptedBackend(lambda prompt: len(prompt))  # expect error
ChatMessage(role="robot", content="x")  # expect error
EngineConfig(n_seq="many")  # expect error
create_app("model.gguf")  # expect error
