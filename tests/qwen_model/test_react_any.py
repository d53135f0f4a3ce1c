"""ReAct, for any conversation with tools: parse is render's inverse, results are never learned, calls and answers always."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_model import react

WORDS = st.text(st.sampled_from("ab1 \n\t.:é好🙂{}\"\\<|"), max_size=14)
LINE = st.text(st.sampled_from("ab_1é好"), min_size=1, max_size=8)
VALUES = st.recursive(
    WORDS | st.integers() | st.booleans() | st.none() | st.floats(-1e9, 1e9), lambda inner: st.lists(inner, max_size=2), max_leaves=3
)
TOOL = st.builds(
    lambda name, description, parameters: {"name": name, "description": description, "parameters": parameters},
    LINE, WORDS.filter(bool), st.dictionaries(LINE, VALUES, min_size=1, max_size=2),
)  # fmt: skip


def clean(text: str) -> str:
    return text.lstrip("\n").rstrip()


@st.composite
def conversations(draw):
    """(messages, tools) as the form can hold them: one call in an answer, a name on each result."""
    tools = draw(st.lists(TOOL, min_size=1, max_size=3, unique_by=lambda tool: tool["name"]))
    messages = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []

    def an_answer(text: str, **more) -> dict:
        weight = draw(st.sampled_from([1, 1, 0.5, 0]))
        return {"role": "assistant", "content": text, **more} | ({} if weight == 1 else {"weight": weight})

    for last in [False] * draw(st.integers(0, 2)) + [True]:
        messages.append({"role": "user", "content": clean(draw(WORDS))})
        for _ in range(draw(st.integers(0, 2))):
            name = draw(st.sampled_from(tools))["name"]
            call = {"type": "function", "function": {"name": name, "arguments": draw(st.dictionaries(LINE, VALUES, max_size=2))}}
            messages.append(an_answer(clean(draw(WORDS)), tool_calls=[call]))
            messages.append({"role": "tool", "content": clean(draw(WORDS)), "name": name})
        messages.append(an_answer(clean(draw(WORDS))))
        if last and messages[-2]["role"] == "tool" and draw(st.booleans()):
            del messages[-2:]  # it ends with a call
    if messages[0]["role"] == "system":
        messages[0]["content"] = clean(messages[0]["content"])
    return messages, [{"type": "function", "function": tool} for tool in tools]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(conversations())
def test_parse_is_the_inverse_of_render(conversation):
    messages, tools = conversation
    rendered = react.render(messages, tools)
    found, found_tools = react.parse(rendered)
    assert found_tools == tools
    assert [without_weights(message) for message in found] == [without_weights(message) for message in messages]
    assert [bool(m.get("weight", 1)) for m in found] == [bool(m.get("weight", 1)) for m in messages]


def without_weights(message: dict) -> dict:
    return {key: value for key, value in message.items() if key != "weight"}


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(conversations())
def test_results_are_never_learned_and_calls_always(conversation):
    messages, tools = conversation
    answers = iter(message for message in react.render(messages, tools) if message["role"] == "assistant")
    turn, learned = None, ""
    for message in messages:
        if message["role"] == "user":
            turn = next(answers)
            weights = [turn.get("weight", 1)] * len(turn["content"])
            for begin, end, weight in turn.get("spans", ()):
                weights[begin:end] = [weight or 0] * (end - begin)
            learned = "".join(char if weight else "\0" for char, weight in zip(turn["content"], weights))
        elif message["role"] == "assistant" and message.get("weight", 1):
            for call in message.get("tool_calls", ()):
                assert f"\nAction: {call['function']['name']}\nAction Input: " in learned
            if "tool_calls" not in message:
                assert learned.endswith(f"Final Answer: {message['content']}")
        elif message["role"] == "tool":
            assert f"Observation: {message['content']}" not in learned or not message["content"]
