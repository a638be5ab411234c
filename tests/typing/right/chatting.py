"""A conversation with a tool."""

from typing import Any

from mtpbatch import ChatCompletion, ChatMessage, Engine, FunctionCall, ToolCall

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
]


def call(function: FunctionCall) -> str:
    return str(sum(function.arguments.values()))


async def converse(engine: Engine, question: str) -> str:
    messages: list[ChatMessage | dict[str, Any]] = [ChatMessage(role="user", content=question)]
    answer: ChatCompletion = await engine.chat(messages, TOOLS, max_tokens=200)
    while answer.tool_calls:
        messages.append(answer.message)
        wanted: ToolCall
        for wanted in answer.tool_calls:
            result = call(wanted.function)
            messages.append({"role": "tool", "content": result, "tool_call_id": wanted.id})
        answer = await engine.chat(messages, TOOLS, template_args={"enable_thinking": False})
    async with engine.stream_chat(messages) as deltas:
        async for delta in deltas:
            print(delta.content, delta.reasoning_content, len(delta.tool_calls))
    print((await deltas).completion.usage.total_tokens)
    return answer.content
