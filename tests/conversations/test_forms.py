"""Every published shape of a sample: from the least sample of each to its turns; and what is no shape, with its remedy followed."""

import json
import re
from pathlib import Path

import pytest
from talks import GOOD, ByteTokenizer, findings, laid_out, turns, write

from finetune.conversations import forms, keys
from finetune.conversations.reading import read
from finetune.conversations.turns import ALLOWED, OTHER_NAMES, ROLES
from finetune.samples.rendered_samples import load

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
Q2, A2 = {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}
SYSTEM = {"role": "system", "content": "s"}
PAIR = [Q, A]
SHAPES = {
    # a question and its answer
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, PAIR),
    "alpaca, input": ({"instruction": "do", "input": "this", "output": "a"}, [{"role": "user", "content": "do\nthis"}, A]),
    "dolly": ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, [{"role": "user", "content": "q\nc"}, A]),
    "ms-swift, old": ({"system": "s", "query": "q2", "response": "a2", "history": [["q", "a"]]}, [SYSTEM, *PAIR, Q2, A2]),
    "orca": ({"id": "1", "system_prompt": "s", "question": "q", "response": "a"}, [SYSTEM, *PAIR]),
    "gsm8k": ({"question": "q", "answer": "a"}, PAIR),
    "numina": ({"problem": "q", "solution": "a"}, PAIR),
    "openai, old": ({"prompt": "q", "completion": "a"}, PAIR),
    "trl": ({"prompt": [SYSTEM, Q], "completion": [A]}, [SYSTEM, *PAIR]),
    "prompt, response": ({"prompt": "q", "response": "a"}, PAIR),
    "input, output": ({"input": "q", "output": "a"}, PAIR),
    "a table's header": ({"Question": "q", "Answer": "a"}, PAIR),
    "thoughts beside": ({"question": "q", "answer": "a", "reasoning": "t"}, [Q, A | {"reasoning_content": "t"}]),
    "weight beside": ({"query": "q", "response": "a", "weight": 0.5}, [Q, A | {"weight": 0.5}]),
    # lists of turns
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PAIR),
    "openai": ({"messages": PAIR}, PAIR),
    "openai beside a prompt": ({"prompt": "q", "prompt_id": "7", "messages": PAIR, "category": "x"}, PAIR),
    "a bare list": (PAIR, PAIR),
    "dialog": ({"dialog": PAIR}, PAIR),
    "dialogue of speakers": ({"dialogue": [{"speaker": "Human", "text": "q"}, {"speaker": "AI", "text": "a"}]}, PAIR),
    "conversation of turns": ({"conversation": [{"role": "user", "value": "q"}, {"role": "assistant", "value": "a"}]}, PAIR),
    "firefly": ({"conversation_id": 1, "conversation": [{"human": "q", "assistant": "a"}, {"human": "q2", "assistant": "a2"}]}, [*PAIR, Q2, A2]),
    "xtuner": ({"conversation": [{"system": "s", "input": "q", "output": "a"}, {"input": "q2", "output": "a2"}]}, [SYSTEM, *PAIR, Q2, A2]),
    "capybara": ({"source": "x", "conversation": [{"input": "q", "output": "a"}]}, PAIR),
    "lima": ({"conversations": ["q", "a"], "source": "x"}, PAIR),
    "ultrachat": ({"id": "0", "data": ["q", "a", "q2", "a2"]}, [*PAIR, Q2, A2]),
    "json in a cell": ({"messages": json.dumps(PAIR)}, PAIR),
    "json in a cell, history": ({"query": "q2", "response": "a2", "history": '[["q", "a"]]'}, [*PAIR, Q2, A2]),
    "other keys of a turn": ({"messages": [{"from": "user", "content": "q"}, {"from": "assistant", "content": "a"}]}, PAIR),
    # several forms that say the same
    "the same twice": ({"messages": PAIR, "question": "q", "answer": "a"}, PAIR),
    "a greeting": ({"messages": [A, Q, A2]}, [A | {"weight": 0.0}, Q, A2]),
    "a greeting that is learned": ({"messages": [A | {"train": True}, Q, A2]}, [A, Q, A2]),
    "a greeting with a weight": ({"messages": [SYSTEM, A | {"weight": 2}, Q, A2]}, [SYSTEM, A | {"weight": 2}, Q, A2]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_and_its_turns(tmp_path, name):
    sample, messages = SHAPES[name]
    path = write(tmp_path, [sample])
    assert [conversation.messages for conversation in read(path)] == [messages]
    assert [conversation.messages for conversation in read(path, bad_samples="drop")] == [messages]


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "thoughts beside"])  # first-generation Qwen has no place for them
def test_a_shape_and_its_labels(tmp_path, name):
    sample, messages = SHAPES[name]
    samples = load(write(tmp_path, [sample]), ByteTokenizer(), max_length=999, cache_dir=tmp_path / "cache")
    ids, labels = laid_out(messages)
    assert [values.tolist() for values in samples[0]] == [ids, labels]
    weights = {message["weight"] for message in messages if message.get("weight")}
    assert samples.weight_sums[0] == samples.supervised[0] * (weights.pop() if len(weights) == 1 and name != "a greeting with a weight" else 1) or (
        name == "a greeting with a weight" and samples.weight_sums[0] > samples.supervised[0]
    )


@pytest.mark.parametrize("role", ["system", *ROLES])
def test_every_role_in_any_case(tmp_path, role):
    meaning = ROLES[role]
    for word in (role, role.upper(), role.capitalize(), f" {role} "):
        if meaning in ("calls", "tool"):
            continue  # tests/conversations/test_tool_spellings.py
        said = {"system": [(word, "s"), ("user", "q"), ("assistant", "a")], "user": [(word, "q"), ("assistant", "a")]}
        sample = turns(*said.get(meaning, [("user", "q"), (word, "a")]))
        roles = [message["role"] for message in next(iter(read(write(tmp_path, [sample])))).messages]
        assert roles == (["system"] if meaning == "system" else []) + ["user", "assistant"]


def test_no_name_of_a_role_has_two_meanings():
    names = [name for several in OTHER_NAMES.values() for name in several]
    assert len(names) == len(set(names)) and all(name == name.lower() for name in names)


# ---- refusals, and their remedies followed to the letter


def rename(old: str, new: str):
    return lambda sample: {new if key == old else key: value for key, value in sample.items()}


def without(*keys: str):
    return lambda sample: {key: value for key, value in sample.items() if key not in keys}


BOTH = {"messages": PAIR, "question": "other", "answer": "a"}
REMEDIES = {
    "two forms": (BOTH, 'has "messages" and "question"/"answer", which differ; keep one of them', without("question", "answer")),
    "two forms, the other": (BOTH, 'has "messages" and "question"/"answer", which differ; keep one of them', without("messages")),
    "two answers": (
        {"question": "q", "answer": "a", "response": "b"},
        'has "question"/"answer" and "question"/"response", which differ; keep one of them',
        without("response"),
    ),
    "misspelt list": (
        {"mesages": PAIR},
        'no "messages" (keys: "mesages"); did you mean "messages"? Rename the key "mesages"',
        rename("mesages", "messages"),
    ),
    "misspelt answer": (
        {"instruction": "q", "ouput": "a"},
        'no "output" (keys: "instruction", "ouput"); did you mean "output"? Rename the key "ouput"',
        rename("ouput", "output"),
    ),
    "a single turn": (
        Q,
        'is a single turn; put the turns of a conversation into {"conversations": [...]}',
        lambda sample: {"conversations": [sample, A]},
    ),
    "text": ({"text": "x"}, f'"text": {forms.NO_FORM["text"]}', lambda sample: {"messages": PAIR}),
    "text of ChatML": (
        {"text": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>"},
        f'"text": {forms.LAID_OUT}',
        lambda sample: {
            "messages": [
                {"role": role, "content": content} for role, content in re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", sample["text"])
            ]
        },
    ),
    "tree": ({"message_tree_id": "1", "prompt": {}}, f'"message_tree_id": {forms.NO_FORM["message_tree_id"]}', lambda sample: {"messages": PAIR}),
    "pairs that are none": (
        {"conversation": [{"human": "q", "assistant": "a"}, {"human": "q"}]},
        "must be one question and one answer, as the first pair is",
        lambda sample: {"conversation": sample["conversation"][:1]},
    ),
    "role": (turns(("narrator", "q"), ("gpt", "a")), f'role "narrator" unknown; {ALLOWED}', lambda sample: turns(("user", "q"), ("gpt", "a"))),
    "no answer": ({"messages": [Q]}, "no assistant answer to learn from; add one, or remove the sample", lambda sample: {"messages": [*sample["messages"], A]}),
    "a last question": (
        {"messages": [Q, A, Q2]},
        "last user turn has no answer; add it or remove the turn (--bad_samples drop removes such turns)",
        lambda sample: {"messages": sample["messages"][:-1]},
    ),
    "a greeting alone": (
        {"messages": [A]},
        'only answer is before any question; mark it with "train": true to learn it, or remove the sample',
        lambda sample: {"messages": [A | {"train": True}]},
    ),
    "two of a role": (
        {"messages": [Q, Q2, A]},
        "are both user; join them or add the turn between them",
        lambda sample: {"messages": [{"role": "user", "content": "q\nq2"}, A]},
    ),
    "empty answer": ({"messages": [Q, A | {"content": " "}]}, "empty answer; write one or remove the sample", lambda sample: {"messages": PAIR}),
}  # fmt: skip


@pytest.mark.parametrize("name", REMEDIES)
def test_a_refusal_and_its_remedy(tmp_path, name):
    sample, message, mend = REMEDIES[name]
    [found] = findings(write(tmp_path, [sample]))
    assert found.split(": ", 1)[1] == message, found
    assert len(read(write(tmp_path, [mend(sample)]))) == 1


BESIDE = [key for key, refusal in keys.REFUSED_BESIDE.items() if "remove the key" in refusal.why]
ON_TURN = [key for key, refusal in keys.REFUSED_ON_TURNS.items() if "remove the key" in refusal.why]


@pytest.mark.parametrize("key, on_turn", [*((key, False) for key in BESIDE), *((key, True) for key in ON_TURN)])
def test_a_key_that_is_to_be_removed(tmp_path, key, on_turn):
    value = {"chat_template_kwargs": {"a": 1}, "eot": False, "end_turn": False}.get(key, True)
    sample = {"messages": [Q, A | {key: value}]} if on_turn else {"messages": PAIR, key: value}
    [found] = findings(write(tmp_path, [sample]))
    assert found.startswith(f'1 sample with "{key}" ') and "remove the key" in found
    assert len(read(write(tmp_path, [{"messages": PAIR}]))) == 1


@pytest.mark.parametrize(
    "sample, mended",
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"messages": [Q, A]}),
        ({"chosen": PAIR, "rejected": [Q, A2]}, {"messages": PAIR}),
        ({"messages": PAIR, "label": True}, {"messages": PAIR}),
        ({"messages": [Q, A | {"mask": True}]}, {"messages": [Q, A | {"train": False}, Q2, A2]}),
        ({"messages": [Q, A | {"train_detail": []}]}, {"messages": [Q, A | {"train": True}]}),
        ({"messages": PAIR, "thinking": "t"}, {"messages": [Q, A | {"thinking": "t"}]}),
        ({"messages": [Q, A | {"reasoning_details": [{"text": "t"}]}]}, {"messages": [Q, A | {"reasoning_content": "t"}]}),
        ({"messages": PAIR, "loss": 0.31}, {"messages": PAIR}),
        ({"messages": PAIR, "loss": 0.31}, {"messages": PAIR, "weight": 0.31}),
        ({"messages": [Q, A | {"weight": "high"}]}, {"messages": [Q, A | {"weight": 1}]}),
        ({"messages": [Q | {"train": True}, A]}, {"messages": PAIR}),
        ({"messages": PAIR, "system": 7}, {"messages": PAIR, "system": "7"}),
        ({"messages": [SYSTEM, *PAIR], "system": "t"}, {"messages": [SYSTEM, *PAIR]}),
        ({"messages": [Q, A | {"content": None}]}, {"messages": PAIR}),
        ({"messages": [Q, {"role": "assistant", "content": "<think>t"}]}, {"messages": [Q, {"role": "assistant", "content": "<think>t</think>a"}]}),
    ],
)
def test_what_is_refused_and_what_its_line_asks_for(tmp_path, sample, mended):
    assert len(findings(write(tmp_path, [sample]))) == 1
    assert len(read(write(tmp_path, [mended]))) == 1


def test_a_key_that_is_near_to_one_by_its_name_alone_is_not_suggested(tmp_path):
    [found] = findings(write(tmp_path, [{"conversation_id": "7", "messages_count": 3, "topic": ["a"]}]))
    assert "did you mean" not in found


def test_a_sample_that_is_left_out_costs_itself_alone(tmp_path):
    data = [GOOD, {"messages": [Q, A, Q2]}, 7, turns(("user", "q"), ("narrator", "a")), {"question": "q", "answer": "a"}]
    path = write(tmp_path, "\n".join([*map(json.dumps, data), "{broken", json.dumps(GOOD)]))
    conversations = read(path, bad_samples="drop")
    assert [len(conversation.messages) for conversation in conversations] == [2, 2, 2, 2] and len(conversations) == 4
    assert conversations.notes[1:4] == [
        "3 of 7 samples left out (--bad_samples drop)",
        f'left out: sample 3 (line 4) turn 2: role "narrator" unknown; {ALLOWED}',
        'left out: 2 lines that cannot be read (first: line 3, column 1, near sample 3: one JSON object per line expected, found "7", here: 7 '
        '{"conversations":)',
    ]
    assert conversations.notes[0].startswith("mixes forms: ")
    assert "1 sample with a last question that has no answer (first: 2); the question is left out" in conversations.notes
    entries = list(conversations.entries())
    assert [entry.number for entry in entries] == [1, 2, 3, 4, 5] and entries[2].reasons == [f'turn 2: role "narrator" unknown; {ALLOWED}']
    assert [text for _, _, text in conversations.broken_lines] == ["7", "{broken"]
    most = read(write(tmp_path, [GOOD, 7, 8]), bad_samples="drop")
    assert most.notes[0] == "MORE THAN HALF: 2 of 3 samples left out (--bad_samples drop)"
    assert findings(write(tmp_path, [7])) == ['sample 1: must be an object with "conversations", found a number']


# ---- the table of data/README.md


def test_the_readme_has_every_form_and_every_role():
    text = (Path(__file__).parents[2] / "data" / "README.md").read_text(encoding="utf-8")
    table = text.split("## Forms")[1].split("\n## ")[0]
    for single in forms.SINGLE:
        for key in (single.question, *single.below, *single.answers):
            assert f"`{key}`" in table, key
    for key in (*forms.TURNS, *forms.SPEAKERS, *forms.TEXTS, forms.HISTORY):
        assert f"`{key}`" in table, key
    for names in OTHER_NAMES.values():
        for name in names:
            assert f"`{name}`" in text, name


def test_the_examples_of_the_table_are_read(tmp_path):
    text = (Path(__file__).parents[2] / "data" / "README.md").read_text(encoding="utf-8")
    table = text.split("## Forms")[1].split("\n## ")[0]
    examples = re.findall(r"\| `([\[{].*[\]}])` \|$", table, re.MULTILINE)
    assert len(examples) >= 8
    for example in examples:
        assert len(read(write(tmp_path, f"[{example}]"))) == 1, example
