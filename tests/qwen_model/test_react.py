"""The ReAct form: letter for letter, and both ways (its tokens: test_react_tokens.py).

The expected texts are written out here by hand. Conversations for the inverse come from a seeded generator.
"""

import json
import random

import pytest

from qwen_model import react
from qwen_model.react import observation_spans, parse, parse_answer, render

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city, now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
QUERY = [{"name": "query", "description": "What to look for, 中文也行", "required": True, "schema": {"type": "string"}}]
SEARCH = {
    "name_for_human": "夸克搜索",
    "name_for_model": "quark_search",
    "description_for_model": "A search engine. Format the arguments as a JSON object.",
    "parameters": QUERY,
}

QUESTION = """\
Answer the following questions as best you can. You have access to the following APIs:

get_weather: Call this tool to interact with the get_weather API. What is the get_weather API useful for? The weather of a city, now. \
Parameters: {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}

quark_search: Call this tool to interact with the 夸克搜索 API. What is the 夸克搜索 API useful for? A search engine. Format the \
arguments as a JSON object. Parameters: [{"name": "query", "description": "What to look for, 中文也行", "required": true, "schema": \
{"type": "string"}}]

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [get_weather, quark_search]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: 巴黎天气怎么样？"""

ANSWER = """\
Thought: I should look.
Action: get_weather
Action Input: {"city": "巴黎"}
Observation: 22°C
Thought: I now know the final answer.
Final Answer: 22 度。"""


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def says(content: str, *calls: dict, **more) -> dict:
    return {"role": "assistant", "content": content} | ({"tool_calls": list(calls)} if calls else {}) | more


def result(content: str, name: str = "get_weather") -> dict:
    return {"role": "tool", "content": content, "name": name}


ASKED = [user("巴黎天气怎么样？"), says("I should look.", call("get_weather", city="巴黎")), result("22°C")]
TALK = [*ASKED, says("22 度。")]
EARLIER = [{"role": "system", "content": "Be brief."}, user("Hi"), says("Hello!")]


def text_of(messages: list[dict], tools=(WEATHER,)) -> str:
    return render(messages, list(tools))[-1]["content"]


# ---- letter for letter


def test_question_and_answer():
    question, answer = render(TALK, [WEATHER, SEARCH])
    assert question == {"role": "user", "content": QUESTION}
    begin = ANSWER.index(" 22°C")
    assert answer == {"role": "assistant", "content": ANSWER, "spans": [(begin, begin + len(" 22°C\nThought:"), None)]}
    bare = [WEATHER["function"], SEARCH]
    assert render(TALK, bare) == render(TALK, [WEATHER, SEARCH])


def test_only_the_last_question_carries_the_instruction():
    rendered = render([*EARLIER, *TALK], [WEATHER, SEARCH])
    assert [message["content"] for message in rendered] == [
        "Be brief.", "Hi", "Thought: I now know the final answer.\nFinal Answer: Hello!", QUESTION, ANSWER
    ]  # fmt: skip


INPUT = 'Action: get_weather\nAction Input: {"city": "Paris"}\nObservation:'
PARIS, ROME = call("get_weather", city="Paris"), call("get_weather", city="Rome")
ROME_INPUT = 'Action: get_weather\nAction Input: {"city": "Rome"}\nObservation:'
LAID_OUT = {
    "a call without thought": ([says("", PARIS)], f"Thought: \n{INPUT}"),
    "a thought with its label": ([says("Thought: Look.", PARIS)], f"Thought: Look.\n{INPUT}"),
    "reasoning of a call": ([says("", PARIS, reasoning_content="Look.")], f"Thought: Look.\n{INPUT}"),
    "reasoning and content": ([says("There.", PARIS, reasoning_content="Look.")], f"Thought: Look.\nThere.\n{INPUT}"),
    "stripped": ([says("\n\n Look. \n", PARIS)], f"Thought:  Look.\n{INPUT}"),
    "after a result": ([says("a", PARIS), result("\n 22 \n\n")], f"Thought: a\n{INPUT}  22\nThought:"),
    "an empty result": ([says("a", PARIS), result("")], f"Thought: a\n{INPUT} \nThought:"),
    "no call": ([says("Hi.\n")], "Thought: I now know the final answer.\nFinal Answer: Hi."),
    "reasoning of an answer": ([says("Hi.", reasoning_content="Easy.")], "Thought: Easy.\nFinal Answer: Hi."),
    "two calls": (
        [says("a", PARIS), result("22"), says("b", ROME), result("31"), says("c")],
        f"Thought: a\n{INPUT} 22\nThought: b\n{ROME_INPUT} 31\nThought: I now know the final answer.\nFinal Answer: c",
    ),
    "parallel calls": (
        [says("a", PARIS, ROME), result("22"), result("31")],
        f"Thought: a\n{INPUT} 22\nThought: \n{ROME_INPUT} 31\nThought:",
    ),
    "the last parallel call waits": ([says("a", PARIS, ROME), result("22")], f"Thought: a\n{INPUT} 22\nThought: \n{ROME_INPUT}"),
    "arguments as text": (
        [says("a", {"id": "1", "function": {"name": "get_weather", "arguments": ' {"city":"Paris"}'}})],
        f"Thought: a\n{INPUT}",
    ),
    "arguments that are no JSON": (
        [says("a", {"function": {"name": "get_weather", "arguments": '{"city": Paris'}})],
        "Thought: a\nAction: get_weather\nAction Input: {\"city\": Paris\nObservation:",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAID_OUT)
def test_answers(name):
    messages, expected = LAID_OUT[name]
    last = render([user("?"), *messages], [WEATHER])[-1]
    assert last["content"] == expected
    assert last.get("open", False) == (not expected.split("\n")[-1].startswith("Final Answer:"))


TOOLS = {
    "no parameters": ({"name": "now"}, "now: Call this tool to interact with the now API. What is the now API useful for?  Parameters: {}"),
    "human and model": (
        {"name": "w", "name_for_human": "Weather", "description": "d", "parameters": {"a": "é"}},
        'w: Call this tool to interact with the Weather API. What is the Weather API useful for? d Parameters: {"a": "é"}',
    ),
    "a long description": (
        {"name": "w", "description": "One.\n\nTwo: Parameters: {}\n", "parameters": [1]},
        "w: Call this tool to interact with the w API. What is the w API useful for? One.\n\nTwo: Parameters: {}\n Parameters: [1]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOOLS)
def test_tools(name):
    tool, expected = TOOLS[name]
    content = render([user("?")], [tool])[0]["content"]
    assert content.startswith(react.HEAD + expected + "\n\nUse the following format:")
    assert parse(render([user("?")], [tool]))[1] == [{"type": "function", "function": react.function_of(tool)}]


def test_without_tools_nothing_changes():
    talk = [*EARLIER, user(" x \n"), says(" y ", weight=0)]
    assert render(talk) == render(talk, []) == talk
    assert parse(talk) == (talk, [])
    with pytest.raises(ValueError, match=r"message 2 \(assistant\) is about a call, but there are no tools"):
        render(TALK)


# ---- refused


def named(name, **more) -> dict:
    return {"name": name, **more}


FORGED = f"x Parameters: {{}}\n\nb: {react.TOOL[8:].split('{')[0]}b API. What is the b API useful for? y"
NOT_LISTED = {
    "result without call": ([user("?"), result("22")], r"message 2 \(tool\): a result, but no call before it that waits for one"),
    "two results": ([*ASKED, result("23")], r"message 4 \(tool\): a result, but no call"),
    "call without result": ([*ASKED[:2], user("and?")], r"message 3 \(user\): the call of get_weather before it has no result"),
    "no answer": ([*ASKED, user("and?")], r"message 4 \(user\): the result before it has no answer"),
    "two answers": ([*TALK, says("more")], r"message 5 \(assistant\): a second answer to the same question"),
    "parallel": ([user("?"), says("", PARIS, ROME)], r"message 2 \(assistant\): calls stand one after the other in this form, so all but"),
    "wrong order": ([user("?"), says("", PARIS), result("x", "other")], r"message 3 \(tool\): a result of other, where get_weather was"),
    "no question": ([says("Hi")], "tools stand in the last question, but the conversation has none"),
    "no arguments": ([user("?"), says("", {"function": {"name": "f"}})], r"message 2 \(assistant\): a call needs a name, and arguments"),
    "action in a thought": ([user("?"), says("a\nAction: b", PARIS)], r"message 2 \(assistant\): its text would be read back"),
    "call in an answer": ([user("?"), says("a\nAction: b\nAction Input: c")], r"message 2 \(assistant\): its text would be read back"),
    "thought in a result": ([*ASKED[:2], result("a\nThought: b"), says("c")], r"message 3 \(tool\): its text would be read back"),
    "final in reasoning": ([user("?"), says("a", reasoning_content="b\nFinal Answer: c")], r"message 2 \(assistant\): its text would"),
    "observation in a thought": ([user("?"), says("a\nObservation: b", PARIS)], r"message 2 \(assistant\): a line of it begins with"),
    "observation in an answer": ([*ASKED, says("a\nObservation: b")], r"message 4 \(assistant\): a line of it begins with"),
    "observation in reasoning": ([user("?"), says("a", reasoning_content="b\nObservation:")], r"message 2 \(assistant\): a line"),
    "observation in arguments": (
        [user("?"), says("", {"function": {"name": "f", "arguments": "{\nObservation: x"}})], r"message 2 \(assistant\): its text would"),
    "a name of two lines": ([user("?"), says("", call("a\nAction Input: b"))], r"message 2 \(assistant\): its text would be read back"),
    "not a number": ([user("?"), says("", call("f", x=float("nan")))], r"message 2 \(assistant\): its text would be read back"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_LISTED)
def test_what_has_no_place_is_refused(name):
    messages, why = NOT_LISTED[name]
    with pytest.raises(ValueError, match=why):
        render(messages, [WEATHER])


@pytest.mark.parametrize(
    "tool, why",
    [
        (named("a\nb"), r"tool 2 \(a\nb\): its name, description or parameters would be read back"),
        (named("a", description=FORGED), r"tool 2 \(a\): its name, description or parameters would be read back"),
        (named(""), "tool 2 has no name"),
        (named(7), "tool 2 has no name, or a name or description that is not a string"),
        ("get_weather", "tool 2 is not an object with a name"),
    ],
)
def test_tools_that_are_refused(tool, why):
    with pytest.raises(ValueError, match=why):
        render([user("?")], [WEATHER, tool])


# ---- there and back again


WORDS = (
    "look 天气 <|im_end|> Action: Thought: Observation: Final Answer: {} \" \\ é é 👩‍👩‍👧 Question: Begin! Parameters: API , ] "
    "\n \n\n \t 3.5 I now know the final answer."
).split(" ")  # fmt: skip


class Maker:
    """Conversations in the normal form, with as much of the form's own words in them as it bears."""

    def __init__(self, seed: int):
        self.draw = random.Random(seed)

    def text(self, most: int = 6) -> str:
        return react.clean(" ".join(self.draw.choices(WORDS, k=self.draw.randrange(most))))

    def name(self) -> str:
        return "".join(self.draw.choices("abc_天é", k=self.draw.randrange(1, 6)))

    def value(self, depth: int = 2):
        kind = self.draw.randrange(6 if depth else 4)
        if kind > 3:
            some = range(self.draw.randrange(3))
            return [self.value(depth - 1) for _ in some] if kind == 4 else {self.text(2): self.value(depth - 1) for _ in some}
        return (self.text(), self.draw.randrange(-9, 9), self.draw.choice([True, False, None]), 0.1)[kind]

    def tool(self) -> dict:
        function = {"name": self.name(), "description": self.text(), "parameters": {self.name(): self.value()}}
        if self.draw.random() < 0.3:
            function["name_for_human"] = self.name() + "!"
        return {"type": "function", "function": {key: value for key, value in function.items() if value}}

    def weight(self) -> dict:
        return {"weight": self.draw.choice([0, 0.5, 2])} if self.draw.random() < 0.2 else {}

    def answer(self) -> list[dict]:
        found = []
        for _ in range(self.draw.choice([0, 0, 1, 2, 3])):
            used = call(self.name(), **{self.name(): self.value() for _ in range(self.draw.randrange(3))})
            found += [says(react.without_label(self.text()), used, **self.weight()), result(self.text(), used["function"]["name"])]
        thoughts = react.without_label(self.text())
        more = {"reasoning_content": thoughts} if thoughts not in ("", react.LAST_THOUGHT) else {}
        return [*found, says(self.text(), **more, **self.weight())]

    def conversation(self) -> tuple[list[dict], list[dict]]:
        messages = [{"role": "system", "content": self.text()}] if self.draw.random() < 0.5 else []
        for _ in range(self.draw.randrange(1, 4)):
            messages += [user(self.text()), *self.answer()]
        while self.draw.random() < 0.3 and messages[-1]["role"] != "user":
            messages.pop()  # ends with a result, a call or a question
        return messages, [self.tool() for _ in range(self.draw.randrange(1, 4))]


@pytest.mark.parametrize("seed", range(8))
def test_parse_is_the_inverse_of_render(seed):
    """Of every conversation that is not refused; and few are, of texts full of the form's own words."""
    maker, refused = Maker(seed), 0
    for _ in range(500):
        messages, tools = maker.conversation()
        before = json.dumps([messages, tools])
        try:
            rendered = render(messages, tools)
        except ValueError as error:
            assert "would be read back as something else" in str(error)
            refused += 1
            continue
        assert parse(rendered) == (messages, tools)
        assert render(*parse(rendered)) == rendered and json.dumps([messages, tools]) == before
    assert refused < 150


def test_weights_of_one_turn():
    messages = [user("?"), says("a", PARIS, weight=0), result("22"), says("b", ROME, weight=0.5), result("31"), says("c")]
    rendered = render(messages, [WEATHER])
    assert parse(rendered)[0] == messages
    content = rendered[-1]["content"]
    assert [(content[begin:end], weight) for begin, end, weight in rendered[-1]["spans"]] == [
        (f"Thought: a\n{INPUT}", 0), (" 22\nThought:", None), (f" b\n{ROME_INPUT}", 0.5), (" 31\nThought:", None)
    ]  # fmt: skip
    assert "weight" not in rendered[-1]
    assert render([*messages[:5], says("c", weight=0)], [WEATHER])[-1]["weight"] == 0


PUBLISHED = """\
Thought: I should call the image tool.
Action: image_gen
Action Input: {"prompt": "a dog in the snow"}
Observation: {"image_url": "https://example.com/dog.png"}
Thought: One more.
Action: image_gen
Action Input: {"prompt": "a cat"}
Observation: {"image_url": "https://example.com/cat.png"}
Thought: I now know the final answer
Final Answer: Here they are."""


def test_an_answer_in_a_file_as_plain_text():
    """Its results are marked, and its text can be read and written again."""
    question = render([user("Draw!")], [{"name": "image_gen"}])[0]
    talk = [question, says(PUBLISHED)]
    for found in (observation_spans(talk), render(talk)):
        marked = [PUBLISHED[begin:end] for begin, end, weight in found[1]["spans"] if weight is None]
        assert marked == [
            ' {"image_url": "https://example.com/dog.png"}\nThought:', ' {"image_url": "https://example.com/cat.png"}\nThought:'
        ]  # fmt: skip
    assert "spans" not in talk[1]
    messages, tools = parse(talk)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert [message["content"] for message in render(messages, tools)] == [message["content"] for message in talk]


@pytest.mark.parametrize("ending", ["\nFinal Answer: b", "\nAction: b\nAction Input: {}", ""])
def test_results_without_a_thought_behind_them(ending):
    question, text = render([user("?")], [WEATHER])[0], "Thought: a\nAction: b\nAction Input: {}\nObservation: 22\n33"
    (span,) = observation_spans([question, says(text + ending)])[1]["spans"]
    assert (text + ending)[slice(*span[:2])] == " 22\n33"


def test_other_texts_stay_as_they_are():
    talk = [user("What is ReAct? Begin!"), says(PUBLISHED), user("Observation: the result of the action"), says("Observation: x")]
    assert observation_spans(talk) == talk
    question = render([user("?")], [WEATHER])[0]
    talk = [question, says("Final Answer: an Observation: is no result"), user("and?"), says("Observation: no call")]
    assert observation_spans(talk) == talk


def test_results_are_marked_in_all_rounds():
    """The published form has the instruction in the last question; a system turn may have it, too."""
    question, plain = render([user("?")], [WEATHER])[0], user("?")
    (_, expected) = observation_spans([question, says(PUBLISHED)])
    assert expected["spans"]
    for talk in ([plain, question], [question, plain]):
        rounds = [message for asked in talk for message in (asked, says(PUBLISHED))]
        assert observation_spans(rounds) == [talk[0], expected, talk[1], expected]
    system = {"role": "system", "content": question["content"]}
    assert observation_spans([system, plain, says(PUBLISHED)]) == [system, plain, expected]


# ---- reading what a model has written


READ = {
    "Thought: a\nAction: f\nAction Input: {\"x\": 1}\n": says("a", call("f", x=1)),
    " a\nAction: f\nAction Input: {\"x\": 1}": says("a", call("f", x=1)),
    " \nAction: f\nAction Input: {}\nObservation: made up\nThought: b\nFinal Answer: c": says("", call("f")),
    "Action: f\nAction Input: {\n \"x\": 1\n}": says("", call("f", x=1)),
    "Thought: a\nAction: f \nAction Input:": says("a", {"type": "function", "function": {"name": "f", "arguments": ""}}),
    "\nAction: f\nAction Input: [1]": says("", {"type": "function", "function": {"name": "f", "arguments": "[1]"}}),
    "\nAction: f\nAction Input: {x": says("", {"type": "function", "function": {"name": "f", "arguments": "{x"}}),
    " I now know the final answer.\nFinal Answer: Warm.\nVery.": says("Warm.\nVery."),
    "Thought: Easy.\nFinal Answer: Warm.": says("Warm.", reasoning_content="Easy."),
    "Final Answer: Warm.": says("Warm."),
    "Thought: Final Answer: Warm.": says("Warm."),
    "Hello!": says("Hello!"),
    "Thought: I wonder": says("I wonder"),
    "Thought: a\nAction: f": says("a\nAction: f"),
    "Thought: a\nAction Input: {}": says("a\nAction Input: {}"),
    "Final Answer: b\nObservation: made up": says("b"),
    "": says(""),
}  # fmt: skip


@pytest.mark.parametrize("text", READ)
def test_parse_answer(text):
    assert parse_answer(text) == READ[text]


@pytest.mark.parametrize("seed", range(4))
def test_a_rendered_answer_is_read_as_what_it_was(seed):
    maker = Maker(seed)
    for _ in range(300):
        (first, *_) = answer = maker.answer()
        try:
            content = text_of([user("?"), *answer])
        except ValueError:
            continue
        assert parse_answer(content) == {key: value for key, value in first.items() if key != "weight"}
