"""Conversations: messages to a prompt by the model's own template, and answers back to messages.

Knows no engine, no native code and no event loop: texts in, texts out.
"""

from __future__ import annotations

from mtpbatch.chat.answer import AnswerFormat, AnswerParser
from mtpbatch.chat.messages import (
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    FunctionCall,
    TextPart,
    ToolCall,
)
from mtpbatch.chat.template import ChatPrompt, ChatTemplate

__all__ = [
    "AnswerFormat",
    "AnswerParser",
    "ChatCompletion",
    "ChatDelta",
    "ChatMessage",
    "ChatPrompt",
    "ChatTemplate",
    "FunctionCall",
    "TextPart",
    "ToolCall",
]
