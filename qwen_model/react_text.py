"""The words of the ReAct form (see react.py), and reading them: text to messages."""

import json
import re

HEAD = "Answer the following questions as best you can. You have access to the following APIs:\n\n"
TOOL = (
    "{name}: Call this tool to interact with the {human} API. What is the {human} API useful for? {description} "
    "Parameters: {parameters}"
)
FORMAT = """

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: """
LAST_THOUGHT = "I now know the final answer."
STOP = "Observation:"  # what the model writes last when it wants a result

TOOL_HEAD = re.compile(r"(.+?): Call this tool to interact with the (.+?) API\. What is the \2 API useful for\? ")
TOOL_PARAMETERS = " Parameters: "
ACTION, ACTION_INPUT = re.compile(r"(?:\A|\n)Action:"), re.compile(r"\nAction Input:")
OBSERVATION, THOUGHT = re.compile(r"(?:\A|\n)Observation:"), "\nThought:"
FINAL_ANSWER = re.compile(r"(?:\A|\n)Final Answer:")


# ---- tools, contents and calls in one form


def function_of(tool: dict, number: int = 1) -> dict:
    """A tool in any of the forms as {"name", "name_for_human" if it is another, "description", "parameters" if it has any}.

    Other keys ("strict", for example) have no place in the instruction and are left out.
    """
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        raise ValueError(f"tool {number} is not an object with a name")
    name = function.get("name_for_model") or function.get("name")
    human = function.get("name_for_human") or function.get("name") or name
    description = function.get("description_for_model") or function.get("description") or ""
    if not name or not all(isinstance(text, str) for text in (name, human, description)):
        raise ValueError(f"tool {number} has no name, or a name or description that is not a string")
    found = {"name": name} | ({"name_for_human": human} if human != name else {})
    found |= {"description": description} if description else {}
    return found | ({"parameters": function["parameters"]} if function.get("parameters") else {})


def clean(text: str) -> str:
    """A content as published: without newlines in front and blanks behind."""
    return text.lstrip("\n").rstrip()


def without_label(text: str) -> str:
    """A thought that says "Thought:" itself gets no second label."""
    while text.startswith("Thought:"):
        text = clean(text.removeprefix("Thought:").removeprefix(" "))
    return text


def call_of(name: str, arguments: dict | str) -> dict:
    """A call. Arguments that are JSON of an object become it; other strings stay what they are."""
    if isinstance(arguments, str):
        arguments = arguments.strip()
        try:
            loaded = json.loads(arguments)
            arguments = loaded if isinstance(loaded, dict) else arguments
        except (ValueError, RecursionError):
            pass
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


# ---- text to messages


def parse(messages: list[dict]) -> tuple[list[dict], list[dict]]:
    """ChatML messages to (messages, tools). Where the last question has no instruction, they stay as they are: no tools."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    read = None if last is None else read_instruction(messages[last]["content"])
    if read is None:
        return [dict(message) for message in messages], []
    tools, question = read
    found = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            for at, part in read_answer(message["content"]):
                weight = weight_at(message, at) if part["role"] == "assistant" else 1
                found.append(part if weight == 1 else part | {"weight": weight})
        else:
            found.append({"role": message["role"], "content": question if i == last else message["content"]})
    return found, [{"type": "function", "function": tool} for tool in tools]


def parse_answer(text: str) -> dict:
    """What the model has written, as one message: its first call, or its final answer.

    Anything is read somehow: without "Final Answer:" all of the text is the content, arguments that are no JSON of an
    object stay a string, and what follows "Observation:" is left out, because the model made it up.
    """
    return read_answer(OBSERVATION.split(text, maxsplit=1)[0])[0][1]


def weight_at(message: dict, at: int) -> float:
    """What the character counts in the loss."""
    spans = (weight or 0 for begin, end, weight in message.get("spans", ()) if begin <= at < end)
    return next(spans, message.get("weight", 1))


def read_instruction(text: str) -> tuple[list[dict], str] | None:
    """(tools, the question behind them); None where the text does not begin with the instruction."""
    if not text.startswith(HEAD):
        return None
    at, tools = len(HEAD), []
    while (tool := read_tool(text, at)) is not None:
        tools.append(tool[0])
        at = tool[1]
        end = FORMAT.format(names=", ".join(tool["name"] for tool in tools))
        if text.startswith(end, at):
            return tools, text[at + len(end) :]
        at += len("\n\n")
    return None


def read_tool(text: str, at: int) -> tuple[dict, int] | None:
    """(the tool at `at`, where it ends). Behind its parameters, which are JSON, stands another tool or the format."""
    head = TOOL_HEAD.match(text, at)
    begin = text.find(TOOL_PARAMETERS, head.end()) if head else -1
    while begin >= 0:
        try:
            parameters, end = json.JSONDecoder().raw_decode(text, begin + len(TOOL_PARAMETERS))
        except (ValueError, RecursionError):
            end = None
        if end and (text.startswith(FORMAT[: FORMAT.index("{")], end) or TOOL_HEAD.match(text, end + 2)):
            tool = {"name": head[1], "name_for_human": head[2], "description": text[head.end() : begin]}
            return function_of(tool | {"parameters": parameters}), end
        begin = text.find(TOOL_PARAMETERS, begin + 1)
    return None


def read_answer(text: str) -> list[tuple[int, dict]]:
    """The messages of one answer, at least one, each with a place in the text that is its own."""
    at, found = 0, []
    while True:
        begin = at = at + len("Thought:") if text.startswith("Thought:", at) else at
        action = ACTION.search(text, at)
        input_ = ACTION_INPUT.search(text, action.end()) if action else None
        if input_ is None:
            return [*found, (begin, read_final(text[at:]))]
        result = OBSERVATION.search(text, input_.end())
        arguments = text[input_.end() : result.start() if result else None]
        call = call_of(text[action.end() : input_.start()].strip(), arguments)
        thought = without_label(clean(text[at : action.start()].removeprefix(" ")))
        found.append((action.start(), {"role": "assistant", "content": thought, "tool_calls": [call]}))
        if result is None or result.end() == len(text):
            return found
        end = text.find(THOUGHT, result.end())
        content = clean(text[result.end() : end if end >= 0 else None].removeprefix(" "))
        found.append((result.start(), {"role": "tool", "content": content, "name": call["function"]["name"]}))
        at = end + 1
        if end < 0 or len(text) == end + len(THOUGHT):
            return found


def read_final(text: str) -> dict:
    """An answer without a call. text: behind "Thought:"."""
    final = FINAL_ANSWER.search(text) or re.search("Final Answer:", text)
    if final is None:
        return {"role": "assistant", "content": clean(text.removeprefix(" "))}
    thought = without_label(clean(text[: final.start()].removeprefix(" ")))
    message = {"role": "assistant", "content": clean(text[final.end() :].removeprefix(" "))}
    return message if thought in ("", LAST_THOUGHT) else message | {"reasoning_content": thought}
