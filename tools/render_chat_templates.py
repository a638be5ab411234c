"""Write down what Hugging Face's ``apply_chat_template`` makes of the tests' conversations.

    pip install transformers
    python tools/render_chat_templates.py

It renders every template in ``tests/chat/templates``, and writes ``tests/chat/expected``: the text,
or the error. Another folder of templates can be given, and one for the results.

Templates that ask for the time get :data:`NOW`.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path
from typing import Any

CHAT = Path(__file__).parents[1] / "tests" / "chat"
NOW = datetime(2026, 3, 14, 15, 9, 26)


class _Clock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return NOW


def tokenizer_with(special_tokens: dict[str, str]) -> Any:
    """A tokenizer that knows no words, only what templates ask for."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    nothing = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=nothing, **special_tokens)


def render(tokenizer: Any, template: str, conversation: dict[str, Any], tools: Any) -> Any:
    """The text; of an error, ``{"error": its type and words}``."""
    try:
        return tokenizer.apply_chat_template(
            conversation["messages"],
            tools=tools.get(conversation.get("tools")),
            chat_template=template,
            tokenize=False,
            **{"add_generation_prompt": True, **conversation.get("template_args", {})},
        )
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Render all templates of a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("templates", nargs="?", type=Path, default=CHAT / "templates")
    parser.add_argument("results", nargs="?", type=Path, default=CHAT / "expected")
    arguments = parser.parse_args()

    import transformers.utils.chat_template_utils as hugging_face

    hugging_face.datetime = _Clock
    conversations = json.loads((CHAT / "conversations.json").read_text())
    tools = json.loads((CHAT / "tools.json").read_text())
    tokens_of = json.loads((CHAT / "templates" / "special_tokens.json").read_text())
    arguments.results.mkdir(exist_ok=True)
    for path in sorted(arguments.templates.glob("*.jinja")):
        special_tokens = tokens_of.get(path.stem, {"bos_token": "<s>", "eos_token": "</s>"})
        tokenizer = tokenizer_with(special_tokens)
        template = path.read_text()
        texts = {
            name: render(tokenizer, template, conversation, tools)
            for name, conversation in conversations.items()
        }
        result = arguments.results / f"{path.stem}.json"
        result.write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n")
        failed = sum(isinstance(text, dict) for text in texts.values())
        print(f"{path.stem}: {len(texts)} conversations, {failed} of them are errors")


if __name__ == "__main__":
    main()
