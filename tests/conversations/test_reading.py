"""Every form that is accepted gives the same conversations, and every finding is provoked and its message read."""

import json
import random
import re
from pathlib import Path

import pytest
from talks import GOOD, TALK, findings, turns, write

from finetune.conversations.forms import LAID_OUT, NO_FORM
from finetune.conversations.messages import Conversation, call
from finetune.conversations.reading import read
from finetune.conversations.sample_reader import EXPECTED
from finetune.conversations.turns import ALLOWED

# ---- what is accepted

SHAREGPT = {"human": "user", "gpt": "assistant"}
BY_ROLE = {
    "conversations": [{"from": m["role"], "value": m["content"]} for m in TALK],
    "messages": [{"role": m["role"], "content": m["content"]} for m in TALK],
}
FORMS = {
    "from/value": [{"id": "a", "conversations": BY_ROLE["conversations"]}],
    "human/gpt": [
        {
            "conversations": [
                {"from": "human" if i % 2 == 0 else "gpt", "value": m["content"]} for i, m in enumerate(TALK)
            ]
        }
    ],
    "messages": [{"messages": BY_ROLE["messages"]}],
    "conversations with role/content": [{"conversations": BY_ROLE["messages"]}],
    "messages with from/value": [{"messages": BY_ROLE["conversations"]}],
    "content in parts": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]},
                *BY_ROLE["messages"][1:],
            ]
        }
    ],
    "alpaca": [
        {
            "instruction": "line\u2028separator\u0085 \x1c here",
            "output": "ok\n",
            "history": [["你好", "Hello"]],
            "input": "",
        }
    ],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("indent", [None, 2])
def test_forms_give_the_same_conversation(tmp_path, form, indent):
    conversations = read(write(tmp_path, json.dumps(FORMS[form], indent=indent, ensure_ascii=False)))
    assert list(conversations) == [Conversation(TALK)]
    assert len(conversations) == 1 and conversations.notes == []


def example(*contents) -> list[dict]:
    return [{"role": role, "content": content} for role, content in zip(["user", "assistant"] * 2, contents)]


UMBRELLA = [
    {"role": "user", "content": "Do I need an umbrella in Paris?"},
    {"role": "assistant", "content": "", "tool_calls": [call("weather", {"city": "Paris"})]},
    {"role": "tool", "content": "rain, 12 °C", "name": "weather"},
    {"role": "assistant", "content": "Yes, it rains."},
]
EXAMPLES = [  # of data/README.md, in its order: what each sample of it is read to
    [example("你好", "你好，我是小星。", "What are you?", "A small model.")],
    [example("Hi", "Hello!"), example("Bye", "See you.")],
    [
        [
            {"role": "system", "content": "You are a translator."},
            *example("Translate to French: dog", "chien", "Translate to French.\ncat", "chat"),
        ]
    ],
    *[[UMBRELLA]] * 4,
    [[m | ({"weight": 0.0} if m["content"] == "5" else {}) for m in example("2 + 2?", "5", "Sure?", "Sorry, 4.")]],
    [[*example("17 * 3?"), {"role": "assistant", "content": "51", "reasoning_content": "10 * 3 = 30, 7 * 3 = 21."}]],
]


def test_the_examples_of_the_readme_are_accepted(tmp_path):
    text = (Path(__file__).parent.parent.parent / "data" / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"^((?:    +[^\n]*\n)+)", text, re.MULTILINE)
    accepted = [read(write(tmp_path, text, f"{i}")) for i, text in enumerate(examples) if text.lstrip()[0] in "[{"]
    assert [conversations.notes for conversations in accepted] == [[]] * len(EXAMPLES)
    assert [[conversation.messages for conversation in conversations] for conversations in accepted] == EXAMPLES
    assert [len(next(iter(conversations)).tools) for conversations in accepted] == [0, 0, 0, 1, 1, 1, 1, 0, 0]
    unknown, pairs = [text.strip() for text in examples if text.lstrip().startswith("talk.json")]
    [found] = findings(write(tmp_path, [turns(("user", "x"), ("narrator", "y"))]))
    assert found.split(": ", 1)[1].startswith(unknown.split(": ", 2)[2].removesuffix(" user, ..."))
    [found] = findings(write(tmp_path, [{"chosen": "x", "rejected": "y"}] * 300))
    assert pairs.startswith("talk.json: ") and found.startswith(pairs.removeprefix("talk.json: ").removesuffix("..."))


def test_alpaca_fields(tmp_path):
    samples = [
        {"instruction": "Translate", "input": "chat", "output": "cat", "system": "You know French.", "history": []},
        {"instruction": "Say A", "input": None, "output": "A", "system": "", "history": None},
    ]
    first, second = (conversation.messages for conversation in read(write(tmp_path, samples)))
    assert [m["content"] for m in first] == ["You know French.", "Translate\nchat", "cat"]
    assert [m["role"] for m in first] == ["system", "user", "assistant"]
    assert second == [{"role": "user", "content": "Say A"}, {"role": "assistant", "content": "A"}]


def test_system_turn_and_system_field(tmp_path):
    inside = turns(("system", "Be short."), ("user", "a"), ("assistant", "b"))
    beside = {"system": "Be short.", **turns(("user", "a"), ("assistant", "b"))}
    first, second = read(write(tmp_path, [inside, beside]))
    assert first == second and first.messages[0] == {"role": "system", "content": "Be short."}


# ---- samples and turns


NO_ANSWER = "no assistant answer to learn from; add one, or remove the sample"
GREETING = 'only answer is before any question; mark it with "train": true to learn it, or remove the sample'
BOTH = "; join them or add the turn between them"
TEXT_PART = 'only {"type": "text", "text": "…"} can be trained on'
QUESTION = {"role": "user", "content": "a"}
CASES = [  # a sample, and what is said of it
    (3, ': must be an object with "conversations", found a number'),
    (turns(), ": empty conversation; remove it"),
    ({"conversations": "hi"}, ': "conversations" must be a list of turns, found a string'),
    ({"conversations": [3]}, ' turn 1: must be an object with "from" and "value", found a number'),
    ({"id": 1, "topic": "x"}, f': no "conversations" (keys: "id", "topic"); {EXPECTED}'),
    ({"id": 1, "text": "x"}, f': "text": {NO_FORM["text"]}'),
    ({"text": "<|im_start|>user\nhi<|im_end|>"}, f': "text": {LAID_OUT}'),
    (
        {"from": "user", "value": "x"},
        ': is a single turn; put the turns of a conversation into {"conversations": [...]}',
    ),
    (GOOD | {"messages": []}, ': has "conversations" and "messages", which differ; keep one of them'),
    # misspelt keys
    (
        {"conversation": []},
        ': no "conversations" (keys: "conversation"); did you mean "conversations"? Rename the key "conversation"',
    ),
    ({"conversation_id": "7", "x": []}, f': no "conversations" (keys: "conversation_id", "x"); {EXPECTED}'),
    ({"chat": [QUESTION]}, f": {NO_ANSWER}"),
    (
        {"conversations": [{"form": "user", "Value": "x"}]},
        ' turn 1: no "from" (keys: "form", "Value"); did you mean "from"? Rename the key "form"',
        ' turn 1: no "value" (keys: "form", "Value"); did you mean "value"? Rename the key "Value"',
    ),
    # roles and their order
    (turns(("narrator", "x")), f' turn 1: role "narrator" unknown; {ALLOWED}'),
    (turns(("usar", "x")), f' turn 1: role "usar" unknown; {ALLOWED}; did you mean "user"?'),
    (turns(("a" * 10_000, "x")), f' turn 1: role "{"a" * 40}…" unknown; {ALLOWED}'),
    (turns(("\x1b[31m\u202e", "x")), f' turn 1: role "\\x1b[31m\\u202e" unknown; {ALLOWED}'),
    (turns((None, "x")), ' turn 1: "from" must be a string, found null'),
    (turns((["user"], "x")), ' turn 1: "from" must be a string, found a list'),
    (turns(("user", "a"), ("system", "s"), ("assistant", "b")), " turn 2: system turn only allowed first"),
    (GOOD | {"system": 1}, ': "system" must be a string, found a number'),
    (
        {"system": "s", **turns(("system", "t"), ("user", "a"), ("assistant", "b"))},
        ': has a "system" and a system turn with another text; keep one',
    ),
    (turns(("system", "s"), ("assistant", "a")), f": {GREETING}"),
    (turns(("user", "a"), ("human", "b"), ("assistant", "c")), f" turns 1,2: are both user{BOTH}"),
    (turns(("user", "a"), ("assistant", "b"), ("gpt", "c")), f" turns 2,3: are both assistant{BOTH}"),
    (turns(("user", "a")), f": {NO_ANSWER}"),
    (turns(("system", "s")), f": {NO_ANSWER}"),
    (
        turns(("user", "a"), ("assistant", "b"), ("user", "c")),
        " turn 3: last user turn has no answer; add it or remove the turn (--bad_samples drop removes such turns)",
    ),
    # contents
    (turns(("user", "a"), ("assistant", None)), ' turn 2: "value" must be a string, found null'),
    (turns(("user", "a"), ("assistant", 1)), ' turn 2: "value" must be a string, found a number'),
    (turns(("user", "a"), ("assistant", 1.5)), ' turn 2: "value" must be a string, found a number'),
    (turns(("user", "a"), ("assistant", True)), ' turn 2: "value" must be a string, found true or false'),
    (turns(("user", {}), ("assistant", "b")), ' turn 1: "value" must be a string, found an object'),
    (turns(("user", ["a"]), ("assistant", "b")), ' turn 1: "value" must be a string, found a list'),
    ({"conversations": [{"from": "user"}]}, ' turn 1: no "value" (keys: "from")'),
    (turns(("user", "a"), ("assistant", "")), " turn 2: empty answer; write one or remove the sample"),
    (turns(("user", "a"), ("assistant", " \n\u3000")), " turn 2: empty answer; write one or remove the sample"),
    (
        {"messages": [QUESTION | {"content": [{"type": "text", "text": "a"}, {"type": "tool_use"}]}]},
        f' turn 1: "content" part 2 is type "tool_use"; {TEXT_PART}',
    ),
    ({"messages": [QUESTION | {"content": [4]}]}, f' turn 1: "content" part 1 is a number; {TEXT_PART}'),
    # alpaca
    (
        {"instruction": "a", "ouput": "b"},
        ': no "output" (keys: "instruction", "ouput"); did you mean "output"? Rename the key "ouput"',
    ),
    ({"instruction": "a", "output": None}, ': no "output" (keys: "instruction")'),
    ({"output": "b"}, ': no "instruction" (keys: "output")'),
    (
        {"instruction": "a", "input": 0, "output": 1},
        ': "input" must be a string, found a number',
        ': "output" must be a string, found a number',
    ),
    (
        {"instruction": "a", "output": "b", "history": "c"},
        ': "history" must be a list of [question, answer] pairs, found a string',
    ),
    (
        {"instruction": "a", "output": "b", "history": [["c", "d"], ["e"], ["f", 1]]},
        " history 2: must be a [question, answer] pair, found a list",
        ' history 3: "answer" must be a string, found a number',
    ),
    ({"instruction": "a", "output": " "}, ' "output": empty answer; write one or remove the sample'),
    (
        {"instruction": "a", "output": "b", "history": [["c", ""]]},
        " history 1 answer: empty answer; write one or remove the sample",
    ),
]


@pytest.mark.parametrize("case", CASES)
def test_findings_of_one_sample(tmp_path, case):
    sample, *messages = case
    assert findings(write(tmp_path, [sample])) == [f"sample 1{message}" for message in messages]


def test_an_unknown_first_line_is_one_sample_among_others(tmp_path):
    lines = [json.dumps({"topic": "x"}), json.dumps(GOOD)]
    assert findings(write(tmp_path, "\n".join(lines))) == [f'sample 1: no "conversations" (keys: "topic"); {EXPECTED}']


def test_half_a_character_and_keys_given_twice(tmp_path):
    text = r"""
[{"conversations": [{"from": "user", "value": "\ud83d\ude00"}, {"from": "assistant", "value": "a\ude00"}]},
{"conversations": [{"from": "user", "value": "a", "value": "b"}, {"from": "assistant", "value": "c"}],
 "conversations": []}]"""
    assert findings(write(tmp_path, text)) == [
        'sample 1 (line 2) turn 2: "value" holds half of a character (\\ude00 alone); write it whole or remove it',
        'sample 2 (line 3): has "conversations" twice; one of them would be lost',
        "sample 2 (line 3): empty conversation; remove it",
    ]
    text = '[{"conversations": [{"from": "user", "value": "a", "value": "b"}, {"from": "assistant", "value": "c"}]}]'
    assert findings(write(tmp_path, text)) == ['sample 1 turn 1: has "value" twice; one of them would be lost']


def test_mixed_forms_name_the_first_sample_of_each(tmp_path):
    alpaca, openai = {"instruction": "a", "output": "b"}, {"messages": TALK}
    assert findings(write(tmp_path, [alpaca, alpaca, GOOD, openai, GOOD])) == [
        'mixes forms: "instruction"/"output" (first: sample 1), "conversations" with from/value (first: sample 3), '
        '"messages" with role/content (first: sample 4); keep one form per file'
    ]


def test_all_findings_of_a_file_come_together(tmp_path):
    lines = [json.dumps(turns(("user", "a"))) for _ in range(1500)]
    several = f"sample 1, sample 2, sample 3 and 1,497 more: {NO_ANSWER}"
    assert findings(write(tmp_path, "\n".join(lines))) == [several]
    found = findings(write(tmp_path, "\n".join([*lines, json.dumps({"messages": TALK}), "{"])))
    assert len(found) == 2 and found[0] == several and "line 1502" in found[1]


def test_kinds_beyond_the_first_twenty_are_counted(tmp_path):
    found = findings(write(tmp_path, [turns(("user", "a"), (f"role{i}", "b"), (f"role{i}", "b")) for i in range(2000)]))
    assert len(found) == 21 and found[20] == "and 3,960 more findings"
    assert found[1] == f'sample 2 turn 2, sample 2 turn 3: role "role1" unknown; {ALLOWED}'


# ---- notes


def test_notes(tmp_path):
    samples = [
        turns(("user", " "), ("assistant", "A"), ("user", ""), ("assistant", "B")),
        turns(("user", "e\u0301"), ("assistant", "what <|im_start|> means")),
        turns(("user", "<|extra_204|>"), ("assistant", "\u00e9 is composed")),
        turns(("user", "<|extra_205|> <|im_end| >"), ("assistant", "neither is special")),
        turns(("user", "same"), ("assistant", "one")) | {"source": "x"},
        turns(("user", "same"), ("assistant", "two")) | {"source": "y"},
        turns(("user", "same"), ("assistant", "one")) | {"source": "y", "hitsory": []},
        turns(("user", "same"), ("assistant", "one"), ("user", "and"), ("assistant", "x")),
    ]
    samples[0]["conversations"][1]["trian"] = False
    path = write(tmp_path, samples)
    assert read(path).notes == [
        "1 sample with an empty user turn (first: 1)",
        "1 sample with text outside Unicode's normal form C (first: 2); the tokenizer normalizes it",
        'keys that are not read: "hitsory" (1 sample, first: 7; did you mean "history"?), "source" (3 samples, first: 5), '
        '"trian" (1 sample, first: 1; did you mean "train"?)',
        "duplicates: 1 sample equal to an earlier one (first: 5 and 7)",
        "conflicting: 3 samples with the same prompt but different answers (first: 5 and 6)",
    ]


def test_duplicates_and_conflicts_against_a_plain_count(tmp_path):
    draw = random.Random(5)
    pairs = [(f"q{draw.randrange(60)}", f"a{draw.randrange(4)}") for _ in range(300)]
    notes = read(write(tmp_path, [turns(("user", q), ("assistant", a)) for q, a in pairs])).notes
    copies = len(pairs) - len(set(pairs))
    again = next(i for i in range(300) if pairs[i] in pairs[i + 1 :])
    answers = {q: {a for other, a in pairs if other == q} for q, _ in pairs}
    conflicts = sum(len(answers[q]) > 1 for q, _ in pairs)
    at_odds = next(i for i in range(300) if len(answers[pairs[i][0]]) > 1)
    other = next(i for i in range(300) if pairs[i][0] == pairs[at_odds][0] and pairs[i] != pairs[at_odds])
    firsts = [f"{again + 1} and {pairs.index(pairs[again], again + 1) + 1}", f"{at_odds + 1} and {other + 1}"]
    assert notes == [
        f"duplicates: {copies} samples equal to an earlier one (first: {firsts[0]})",
        f"conflicting: {conflicts} samples with the same prompt but different answers (first: {firsts[1]})",
    ]
