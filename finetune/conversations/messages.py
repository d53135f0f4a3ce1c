"""The one form into which every published spelling of a conversation is read, and which every renderer takes.

It is OpenAI's form of messages, with everything that may be absent left out. A message is a dict:

    role               "system", "user", "assistant" or "tool"
    content            a string, always there; "" where the file has none
    weight             of an answer: what its tokens count in the loss. Left out where it is 1; 0: context, not learned
    reasoning_content  of an answer: its thoughts, a string that is not empty
    tool_calls         of an answer: [{"type": "function", "function": {"name": str, "arguments": dict}}], at least one
    name               of a tool's result: the tool that was called, where it is known

Results of tools stand in the order of the calls, behind the answer that made these.
"""

from typing import NamedTuple


class Conversation(NamedTuple):
    """messages: see above. tools: [{"type": "function", "function": {"name", "description", "parameters"}}], as the file has
    them; none where the conversation has no tools."""

    messages: list[dict]
    tools: list[dict] = []


def call(name: str, arguments: dict) -> dict:
    """One entry of tool_calls."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}
