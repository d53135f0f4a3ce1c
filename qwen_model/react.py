"""Tools in first-generation Qwen: the ReAct form that it was trained on, written once, both ways.

The model has no tokens for tools. The last question carries an instruction that lists them, and one answer holds all calls:

    Thought: I should look.
    Action: get_weather
    Action Input: {"city": "Paris"}
    Observation: 22 degrees
    Thought: I now know the final answer.
    Final Answer: It is warm in Paris.

Calls come in as OpenAI's messages: an answer with content (its thought) and tool_calls, then a message of role "tool"
with the result, and so on. An entry of tool_calls is {"type": "function", "function": {"name", "arguments": dict}}. An
answer may have reasoning_content (thoughts) and weight (see chatml.py). A tool is {"name", "description", "parameters"},
alone or as {"type": "function", "function": ...}, or has Qwen's own name_for_model, name_for_human, description_for_model.

`render` makes ChatML messages of them, which chatml.py turns into tokens; `parse` is its inverse, up to what `normal`
evens out. react_text.py has the words of the form, and reads them. The form has no escapes, so a text that contains its
marks could be read as something else: it is refused.
"""

import json
import re
from itertools import zip_longest

from .react_text import (
    FORMAT,
    HEAD,
    LAST_THOUGHT,
    STOP,
    THOUGHT,
    TOOL,
    call_of,
    clean,
    function_of,
    parse,
    parse_answer,
    read_instruction,
    without_label,
)

__all__ = ["function_of", "observation_spans", "parse", "parse_answer", "render", "render_asked"]

# Plain text in this form, as the published example for fine-tuning has it: the question has these words.
MARKED = ("Observation: the result of the action", "Begin!")
RESULT = re.compile(r"(?<![^\n])Observation:(.*?(?:\nThought:|(?=\nFinal Answer:|\nAction:)|\Z))", re.DOTALL)


# ---- messages to text


def render(messages: list[dict], tools: list[dict] = ()) -> list[dict]:
    """ChatML messages (see chatml.py). Without tools: the same ones, through `observation_spans`.

    The instruction goes to the last question; the answers to all questions have the form. A result, and the "\\nThought:"
    behind it with which the model is asked to go on, is a span of weight None. A conversation that ends with a call or a
    result ends in an open turn: "...\\nObservation:", which is learned, for the model to stop there; or "...\\nThought:".
    Raises ValueError naming the message or tool that has no place in this form, or would be read back as something else.
    """
    if not tools:
        for number, message in enumerate(messages, 1):
            if message["role"] == "tool" or message.get("tool_calls"):
                raise ValueError(f"message {number} ({message['role']}) is about a call, but there are no tools")
        return observation_spans(messages)
    tools = [function_of(tool, number) for number, tool in enumerate(tools, 1)]
    plain, numbers = normal(messages)
    laid_out = lay_out(plain, tools)
    found, found_tools = parse(laid_out)
    if [tool["function"] for tool in found_tools] != tools:
        alone = (i for i, tool in enumerate(tools) if read_instruction(instruction([tool])) != ([tool], ""))
        number = next(alone, len(tools) - 1)
        what = "its name, description or parameters would be read back as something else"
        raise ValueError(f"tool {number + 1} ({tools[number]['name']}): {what}")
    for number, message, wanted in zip_longest(numbers, found, plain):
        if message != wanted:
            number = number or numbers[-1]
            what = 'its text would be read back as something else (a line "Action:" or "Thought:", for example)'
            raise ValueError(f"message {number} ({messages[number - 1]['role']}): {what}")
    return laid_out


def render_asked(messages: list[dict], tools: list[dict] = ()) -> list[dict]:
    """`render` of a conversation that is to be answered."""
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise ValueError("a prompt ends with a message by the user, or with the result of a tool")
    return render(messages, tools)


def stop_sequences(tokenizer) -> list[list[int]]:
    """Token sequences at which generation ends, with the newline in front and without (it may be part of another token)."""
    return [tokenizer.encode_ordinary("\n" + STOP), tokenizer.encode_ordinary(STOP)]


def by_question(messages: list[dict]) -> list[list[dict]]:
    """One conversation for each question, up to its answer, in which what was answered before weighs nothing.

    As training samples: each answer is learned after the prompt in which the model will be asked for it, with the
    instruction in its question. Questions whose answers weigh nothing have none.
    """
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    found = []
    for begin, end in zip(questions, [*questions[1:], len(messages)]):
        learned = [m for m in messages[begin:end] if m["role"] == "assistant" and m.get("weight", 1)]
        if learned:
            before = [m | {"weight": 0} if m["role"] == "assistant" else m for m in messages[:begin]]
            found.append(before + messages[begin:end])
    return found


def lay_out(messages: list[dict], tools: list[dict]) -> list[dict]:
    """The work of `render`, on messages as `normal` gives them and tools as `function_of` does."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise ValueError("tools stand in the last question, but the conversation has none")
    laid_out, turn = [], []  # turn: (text, weight) of the parts of the answer that is going on
    for i, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "tool":
            turn.append((f" {content}{THOUGHT}", None))
        elif message["role"] == "assistant":
            label, weight = "" if turn else "Thought:", message.get("weight", 1)
            if calls := message.get("tool_calls"):
                name, arguments = calls[0]["function"].values()
                text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
                turn.append((f"{label} {content}\nAction: {name}\nAction Input: {text}\n{STOP}", weight))
            else:
                thought = message.get("reasoning_content", LAST_THOUGHT)
                turn.append((f"{label} {thought}\nFinal Answer: {content}", weight))
                laid_out.append(answer_of(turn))
                turn = []
        else:
            question = instruction(tools) + content if i == last else content
            laid_out.append({"role": message["role"], "content": question})
    return [*laid_out, answer_of(turn) | {"open": True}] if turn else laid_out


def answer_of(parts: list[tuple[str, float | None]]) -> dict:
    """One assistant message of (text, weight) parts. It weighs what its last part does, that is not a result."""
    weight = next(part_weight for _, part_weight in reversed(parts) if part_weight is not None)
    spans, at = [], 0
    for text, part_weight in parts:
        if part_weight != weight:
            spans.append((at, at + len(text), part_weight))
        at += len(text)
    message = {"role": "assistant", "content": "".join(text for text, _ in parts)}
    return message | ({} if weight == 1 else {"weight": weight}) | ({"spans": spans} if spans else {})


def instruction(tools: list[dict]) -> str:
    """What stands before the question. A tool without parameters has "{}" in their place."""
    lines = []
    for tool in tools:
        words = {"human": tool.get("name_for_human", tool["name"]), "description": tool.get("description", "")}
        parameters = json.dumps(tool.get("parameters", {}), ensure_ascii=False)
        lines.append(TOOL.format(name=tool["name"], parameters=parameters, **words))
    return HEAD + "\n\n".join(lines) + FORMAT.format(names=", ".join(tool["name"] for tool in tools))


# ---- messages as this form can tell them


def normal(messages: list[dict]) -> tuple[list[dict], list[int]]:
    """The messages as `parse` gives them back; and for each the number, from 1, of the message it comes from.

    Contents are `clean`. An answer makes at most one call: parallel ones follow each other, with no thought between.
    The thought before a call is its content: reasoning_content, content or both, with a newline between. Arguments that are
    JSON of an object are that object, other strings stay. A result has the name of its tool. Ids of calls are left out.
    """
    found, numbers = [], []
    waiting, caller, weight = [], 0, 1  # calls without a result (the first is in `found`); whose they are, and its weight
    number = 0

    def refuse(why: str):
        raise ValueError(f"message {number} ({messages[number - 1]['role']}): {why}")

    def add(role: str, content: str, weight: float = 1, **more):
        if role == "assistant" and f"\n{STOP}" in f"{content} {more.get('reasoning_content')}":
            refuse(f'a line of it begins with "{STOP}", at which generation stops')
        found.append({"role": role, "content": content, **more} | ({} if weight == 1 else {"weight": weight}))
        numbers.append(number)

    for number, message in enumerate(messages, 1):
        role, content = message["role"], clean(message["content"])
        before = found[-1] if found else {"role": None}
        if role == "tool":
            if not waiting:
                refuse("a result, but no call before it that waits for one")
            name = waiting.pop(0)["function"]["name"]
            if message.get("name", name) != name:
                refuse(f"a result of {message['name']}, where {name} was called - results stand in the order of the calls")
            add(role, content, name=name)
            if waiting:
                add("assistant", "", weight, tool_calls=waiting[:1])
                numbers[-1] = caller
        elif waiting:
            refuse(f"the call of {waiting[0]['function']['name']} before it has no result")
        elif role == "assistant":
            if before["role"] == "assistant":
                refuse("a second answer to the same question")
            thoughts, weight, caller = clean(message.get("reasoning_content") or ""), message.get("weight", 1), number
            if message.get("tool_calls"):
                waiting = [plain_call(call, refuse) for call in message["tool_calls"]]
                thoughts = without_label("\n".join(text for text in (thoughts, content) if text))
                add(role, thoughts, weight, tool_calls=waiting[:1])
            else:
                thoughts = without_label(thoughts)
                known = not thoughts or thoughts == LAST_THOUGHT
                add(role, content, weight, **({} if known else {"reasoning_content": thoughts}))
        elif before["role"] == "tool":
            refuse("the result before it has no answer")
        else:
            add(role, content)
    if len(waiting) > 1:
        name, number = waiting[0]["function"]["name"], caller
        refuse(f"calls stand one after the other in this form, so all but the last need a result; {name} has none")
    return found, numbers


def plain_call(call: dict, refuse) -> dict:
    """One entry of tool_calls, without its id."""
    function = call.get("function", call)
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, (dict, str)):
        refuse("a call needs a name, and arguments that are an object or a string")
    return call_of(name, arguments)


# ---- calls that are plain text already


def observation_spans(messages: list[dict]) -> list[dict]:
    """Conversations whose calls are plain text: the results in such answers become spans of weight None, never learned.

    They are marked by the words of the instruction (MARKED) in any text of the user or the system: the published form has them
    in the last question only, and answers to all questions in the form. Other conversations stay as they are.
    """
    asked = [message["content"] for message in messages if message["role"] != "assistant"]
    if not any(all(words in text for words in MARKED) for text in asked):
        return messages
    found = []
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant" and "spans" not in message and "Action Input:" in content:
            spans = [(*match.span(1), None) for match in RESULT.finditer(content) if match[1]]
            message = message | ({"spans": spans} if spans else {})
        found.append(message)
    return found
