"""Each key that changes what a sample means is read, or refused by name; a row for each."""

import json
import time

import pytest
from talks import findings, turns, write

from finetune.conversations import keys
from finetune.conversations.reading import begins_well, read

Q = {"role": "user", "content": "q"}
LONG = "9" * 5000


def answer(content="a", **more) -> dict:
    return {"role": "assistant", "content": content} | more


def chat(*messages, **beside) -> dict:
    return {"messages": list(messages)} | beside


def messages_of(folder, sample) -> list[dict]:
    """The inner form of a sample that nothing is to be said of."""
    conversations = read(write(folder, [sample]))
    [conversation] = conversations
    assert conversations.notes == [] and conversation.tools == []
    return conversation.messages


# ---- what is learned

WEIGHTS = [  # keys on an answer, and its weight
    *(({key: True}, 1) for key in keys.TRAINED),
    *(({key: 1}, 1) for key in keys.TRAINED),
    *(({key: False}, 0.0) for key in keys.TRAINED),
    *(({key: 0}, 0.0) for key in keys.TRAINED),
    ({"weight": 0.25}, 0.25),
    ({"loss_scale": 2}, 2.0),
    ({"weight": 1.0}, 1),
    ({"weight": None}, 1),
    ({"masked": True}, 0.0),
    ({"masked": 1}, 0.0),
    ({"masked": False}, 1),
    ({"train": True, "masked": False}, 1),
    ({"train": False, "weight": 0}, 0.0),
    ({"loss": True, "loss_scale": 0.5}, 0.5),
    ({"loss": None, "train": False}, 0.0),
]


@pytest.mark.parametrize(("said", "weight"), WEIGHTS)
def test_weight_of_an_answer(tmp_path, said, weight):
    expected = [Q, answer() if weight == 1 else answer(weight=weight), Q, answer("b")]
    found = messages_of(tmp_path, chat(Q, answer(**said), Q, answer("b")))
    assert found == expected and [type(m.get("weight")) for m in found] == [type(m.get("weight")) for m in expected]


SAMPLES = [  # keys beside the turns, on the first answer, and the weights of both
    ({"weight": 0.5}, {}, [0.5, 0.5]),
    ({"weight": 0.5}, {"weight": 4}, [2.0, 0.5]),
    ({"weight": 2}, {"train": False}, [0.0, 2.0]),
    ({"weight": 2}, {"weight": 0.5}, [1, 2.0]),
    ({"loss": True}, {}, [1, 1]),
    ({"train": True, "masked": None}, {}, [1, 1]),
]


@pytest.mark.parametrize(("beside", "said", "weights"), SAMPLES)
def test_weight_of_a_sample(tmp_path, beside, said, weights):
    found = messages_of(tmp_path, chat(Q, answer(**said), Q, answer("b"), **beside))
    assert [m.get("weight", 1) for m in found[1::2]] == weights


def test_weight_of_an_alpaca_sample(tmp_path):
    sample = {"instruction": "q", "output": "a", "weight": 3, "history": [["c", "d"]]}
    assert [m.get("weight") for m in messages_of(tmp_path, sample)] == [None, 3.0, None, 3.0]


@pytest.mark.parametrize("said", [{"train": False}, {"weight": 0}, {"loss": False}, {"loss": None}])
def test_a_turn_that_is_no_answer_may_say_that_it_is_not_learned(tmp_path, said):
    assert messages_of(tmp_path, chat(Q | said, answer())) == [Q, answer()]


NUMBER = "must be true, false, 0 or a number from 0.000001 to 1,000,000"
NOT_LEARNED = (
    ': no assistant answer to learn from: all are marked as not to be learned ("train": false, "weight": 0 or the like); remove the sample'
)
THOUGHTS = 'has thoughts twice ("reasoning_content", "thinking"), which differ; keep one of them'
MEASURED = (
    ': "loss" beside the turns must be true or false; a number there is usually a loss that was measured: remove the '
    'key, or call it "weight" if it is one'
)
FINDINGS = [  # a sample, and what is said of it
    (chat(Q, answer(train="no")), f' turn 2: "train" {NUMBER}, found a string'),
    (chat(Q, answer(weight=-1)), f' turn 2: "weight" {NUMBER}, found -1'),
    (chat(Q, answer(weight=float("nan"))), f' turn 2: "weight" {NUMBER}, found a number that is not finite'),
    (chat(Q, answer(weight=[])), f' turn 2: "weight" {NUMBER}, found a list'),
    (chat(Q, answer(masked=0.5)), ' turn 2: "masked" must be true or false, found 0.5'),
    (chat(Q, answer(train=True, weight=0)), ' turn 2: "train", "weight" contradict each other; keep one of them'),
    (chat(Q, answer(train=True, masked=True)), ' turn 2: "train", "masked" contradict each other; keep one of them'),
    (chat(Q, answer(weight=2, loss_scale=3)), ' turn 2: "weight", "loss_scale" contradict each other; keep one of them'),
    (chat(Q | {"weight": 1}, answer()), ' turn 1: "weight" on role user: only answers are learned; remove it there'),
    (chat(Q | {"train": "x"}, answer()), f' turn 1: "train" {NUMBER}, found a string'),
    (chat(Q | {"masked": False}, answer()), ' turn 1: "masked" on role user: only answers are learned; remove it there'),
    (chat(Q, answer(train=False)), NOT_LEARNED),
    (chat(Q, answer(), weight=0), NOT_LEARNED),
    (chat(Q, answer(weight=1e300)), f' turn 2: "weight" {NUMBER}, found a number'),
    (chat(Q, answer(weight=1e-300)), f' turn 2: "weight" {NUMBER}, found 1e-300'),
    (chat(Q, answer("<think>b</think>")), " turn 2: thoughts without an answer; write one behind </think> or remove the sample"),
    (chat(Q, answer(), loss=0.25), MEASURED),
    (chat(Q, answer(), train="yes"), f': "train" {NUMBER}, found a string'),
    (chat(Q, answer(), train=True, masked=True), ': "train", "masked" contradict each other; keep one of them'),
    # thoughts
    (chat(Q, answer(reasoning_content="x", thinking="y")), f" turn 2: {THOUGHTS}"),
    (
        chat(Q, answer("<think>x</think>a", thought="x")),
        ' turn 2: has thoughts twice ("thought" and <think> in the content); keep one of them',
    ),
    (
        chat(Q, answer([{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "a"}], thought="y")),
        ' turn 2: has thoughts twice ("thought" and the content), which differ; keep one of them',
    ),
    (chat(Q | {"reasoning": "x"}, answer()), ' turn 1: "reasoning" on role user; only an answer can have it'),
    (chat(Q, answer(thinking=True)), ' turn 2: "thinking" must be a string, found true or false'),
    (
        chat(Q, answer(thinking="\ud83d")),
        ' turn 2: "thinking" holds half of a character (\\ud83d alone); write it whole or remove it',
    ),
    (
        chat(Q, answer(" <think>x")),
        " turn 2: <think> without </think>: the answer was cut off; write it whole or remove the sample",
    ),
    (
        {"instruction": "q", "output": "<think>x</think>a", "thinking": "y"},
        ': has thoughts twice ("thinking" and <think> in "output"); keep one of them',
    ),
    # the system turn
    (
        chat(Q, answer(), system_prompt="s", system="t"),
        ': has "system_prompt", "system" with different texts; keep one of them',
    ),
    (
        chat({"role": "system", "content": "t"}, Q, answer(), system_prompt="s"),
        ': has a "system_prompt" and a system turn with another text; keep one',
    ),
    (chat(Q, answer(), system_message=["s"]), ': "system_message" must be a string, found a list'),
    # refusals of a client
    (chat(Q, answer("a", refusal="b")), ' turn 2: has "content" and "refusal"; keep one of them'),
    (chat(Q | {"refusal": "b"}, answer()), ' turn 1: "refusal" on role user; only an answer can have it'),
    (chat(Q, answer(None)), ' turn 2: "content" must be a string, found null'),
    (
        {"id": "x", "messages": None},
        ': no "conversations" (keys: "id"); expected "conversations" (from/value), "messages" (role/content), '
        '"instruction"/"output" or another form of data/README.md',
    ),
]


@pytest.mark.parametrize(("sample", "message"), FINDINGS)
def test_findings(tmp_path, sample, message):
    path = write(tmp_path, json.dumps([sample]))
    assert findings(path) == [f"sample 1{message}"] and not begins_well(path)


# ---- the whole file is refused, in one line

PAIRS = (
    "a better and a worse answer, which preference training (DPO) needs: to learn the better ones, put each behind its "
    'prompt into "messages" and remove these keys'
)
MARKED = (
    "answers marked as good or bad, which preference training (KTO) needs: to learn the good ones, keep the samples "
    "where it is true and remove the key"
)
MEDIA = "images, sound or video: this trains on text only; remove these samples, or what they show and its placeholders"
DETAIL = 'parts of a turn cannot be learned, an answer as a whole can: mark it with "train" instead'
UNFINISHED = 'answers are learned with their end; finish them, or mark them with "train": false, and remove the key'
SWITCH = "each answer is laid out with the thoughts that it has; remove the key"
PICTURE = {"type": "image_url", "image_url": {"url": "x"}}
REFUSED = [  # a sample, what is named, and why it is refused
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, '"chosen", "rejected"', PAIRS),
    ({"chosen": [Q, answer()], "rejected": [Q, answer("b")]}, '"chosen", "rejected"', PAIRS),
    ({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}}, '"chosen"', PAIRS),
    ({"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, '"chosen", "rejected"', PAIRS),
    *((chat(Q, answer(), **{key: [answer("b")]}), f'"{key}"', PAIRS) for key in keys.PAIRS),
    (chat(Q, answer(), rejected_response="b"), '"rejected_response"', PAIRS),
    (chat(Q, answer(), label=False), '"label"', MARKED),
    (chat(Q, answer(), label=0), '"label"', MARKED),
    (chat(Q, answer(), kto_tag=1), '"kto_tag"', MARKED),
    (chat(Q, answer(), label=True), '"label"', MARKED),
    (turns(("user", "q"), ("gpt", "a")) | {"kto_tag": False}, '"kto_tag"', MARKED),
    ({"prompt": "q", "completion": "a", "label": True}, '"label"', MARKED),
    *((chat(Q, answer(), **{key: ["a.png"]}), f'"{key}"', MEDIA) for key in keys.MEDIA),
    *((chat(Q | {key: "a.png"}, answer()), f'"{key}"', MEDIA) for key in keys.MEDIA),
    (chat(Q, answer(), objects={"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}), '"objects"', MEDIA),
    *(
        (chat({"role": "user", "content": [{"type": kind}]}, answer()), f'a part of type "{kind}"', MEDIA)
        for kind in sorted(keys.MEDIA_PARTS)
    ),
    (chat({"role": "user", "content": [{"image": "x"}]}, answer()), 'a part of type "image"', MEDIA),
    (chat({"role": "user", "content": "<image>\nwhat is it?"}, answer()), "<image> in a user's text", MEDIA),
    (chat({"role": "user", "content": "what is it? <video> "}, answer()), "<video> in a user's text", MEDIA),
    (chat({"role": "user", "content": "listen:\n  <audio>\nand?"}, answer()), "<audio> in a user's text", MEDIA),
    (chat({"role": "user", "content": "listen:\r\n<audio>\r\nand?"}, answer()), "<audio> in a user's text", MEDIA),
    (
        chat({"role": "user", "content": "Picture 1: <img>a/b.png</img> what?"}, answer()),
        "<img>…</img> in a user's text",
        MEDIA,
    ),
    ({"instruction": "<image> what?", "output": "a"}, "<image> in a user's text", MEDIA),
    (chat(Q, answer(train_detail=[{"begin_offset": 0}])), '"train_detail" on a turn', DETAIL),
    (chat(Q, answer(training_detail=[])), '"training_detail" on a turn', DETAIL),
    (chat(Q, answer(prefix=True)), '"prefix" on a turn', UNFINISHED),
    (chat(Q, answer(partial=True)), '"partial" on a turn', UNFINISHED),
    (chat(Q, answer(eot=False)), '"eot" on a turn', UNFINISHED),
    (chat(Q, answer(end_turn=False)), '"end_turn" on a turn', UNFINISHED),
    (chat(Q, answer(enable=1), enable_thinking=False), '"enable_thinking" beside the turns', SWITCH),
    (chat(Q, answer(), mask="User"), '"mask" beside the turns', keys.REFUSED_BESIDE["mask"].why),
    (chat(Q, answer(mask=True)), '"mask" on a turn', keys.REFUSED_ON_TURNS["mask"].why),
    (chat(Q, answer(channel="analysis")), '"channel" on a turn', keys.REFUSED_ON_TURNS["channel"].why),
    (
        chat(Q, answer(reasoning_details=[{}])),
        '"reasoning_details" on a turn',
        keys.REFUSED_ON_TURNS["reasoning_details"].why,
    ),
    (
        chat(Q, answer(), chat_template_kwargs={"enable_thinking": False}),
        '"chat_template_kwargs" beside the turns',
        keys.REFUSED_BESIDE["chat_template_kwargs"].why,
    ),
    (chat(Q, answer(), chat_template="x"), '"chat_template" beside the turns', keys.REFUSED_BESIDE["chat_template"].why),
    (
        chat(Q, answer(), reasoning_content="x"),
        '"reasoning_content" beside the turns',
        "put the thoughts on the answer that they belong to",
    ),
]


@pytest.mark.parametrize(("sample", "what", "why"), REFUSED)
def test_refused_in_one_line(tmp_path, sample, what, why):
    good = chat(Q, answer()) if "messages" in sample else turns(("user", "q"), ("gpt", "a"))
    good = {"instruction": "q", "output": "a"} if "instruction" in sample else good
    path = write(tmp_path, [good] + [sample] * 30)
    assert findings(path) == [f"30 samples with {what} (first: 2): {why}"] and not begins_well(path)


def test_refusals_stand_before_findings(tmp_path):
    data = [
        chat(Q, answer(), images=["a"]),
        *[chat(Q)] * 30,
        chat(Q | {"audio": "x"}, answer()),
        chat(Q, answer(prefix=True)),
    ]
    media, prefix, found = findings(write(tmp_path, data))
    assert media == f'2 samples with "images", "audio" (first: 1): {MEDIA}'
    assert prefix == f'1 sample with "prefix" on a turn (first: 33): {UNFINISHED}'
    assert found == "sample 2, sample 3, sample 4 and 27 more: no assistant answer to learn from; add one, or remove the sample"
    broken = json.dumps(data)[:-1] + ", {"
    assert findings(write(tmp_path, broken))[:2] == [media, prefix]


# ---- what is read

HTML = "<video>\n  <source src='a.mp4'>\n</video>"
READ = [  # a sample and its inner form
    *((chat(Q, answer(**{key: "x"})), [Q, answer(reasoning_content="x")]) for key in keys.THOUGHTS),
    *(({"instruction": "q", "output": "a", key: "x"}, [Q, answer(reasoning_content="x")]) for key in keys.THOUGHTS),
    (chat(Q, answer(reasoning="x", reasoning_content="x")), [Q, answer(reasoning_content="x")]),
    (chat(Q, answer(reasoning=" ", thinking="")), [Q, answer()]),
    (turns(("user", "q"), ("gpt", "a")) | {"messages": None}, [Q, answer()]),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "thought": "x"}]},
        [Q, answer(reasoning_content="x")],
    ),
    (
        chat(Q, answer([{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "a"}])),
        [Q, answer(reasoning_content="x")],
    ),
    (
        chat(Q, answer([{"type": "reasoning", "text": "x"}, {"type": "text", "text": "a"}])),
        [Q, answer(reasoning_content="x")],
    ),
    (
        chat(Q, answer([{"type": "thinking", "thinking": [{"type": "text", "text": "x"}]}, {"type": "text", "text": "a"}])),
        [Q, answer(reasoning_content="x")],
    ),
    (chat(Q, answer("<think>x</think>a")), [Q, answer("<think>x</think>a")]),
    *((chat(Q, answer(), **{key: "s"}), [{"role": "system", "content": "s"}, Q, answer()]) for key in keys.SYSTEM),
    (chat(Q, answer(), system="s", system_prompt="s"), [{"role": "system", "content": "s"}, Q, answer()]),
    (chat({"role": "system", "content": "s"}, Q, answer(), system="s"), [{"role": "system", "content": "s"}, Q, answer()]),
    (chat({"role": "system", "content": ""}, Q, answer(), system="s"), [{"role": "system", "content": "s"}, Q, answer()]),
    (chat(Q, answer(), system="", system_prompt=None), [Q, answer()]),
    ({"instruction": "q", "output": "a", "system_prompt": "s"}, [{"role": "system", "content": "s"}, Q, answer()]),
    (chat(Q, answer(None, refusal="no")), [Q, answer("no")]),
    (chat(Q, answer([{"type": "refusal", "refusal": "no"}])), [Q, answer("no")]),
    (chat(Q, answer("no", refusal="no")), [Q, answer("no")]),
    # null and what is empty say nothing
    (
        chat(
            Q | dict.fromkeys([*keys.ON_TURN, "odd"]),
            answer(**dict.fromkeys([*keys.ON_TURN, "odd"])),
            **dict.fromkeys([*keys.BESIDE_TURNS.keys() - {"messages"}, "odd"]),
        ),
        [Q, answer()],
    ),
    (chat(Q, answer(), images=[], audio="", tools=[], functions="[]", objects={"ref": [], "bbox": []}), [Q, answer()]),
    (chat(Q | {"images": []}, answer(tool_calls=[], function_call={}, audio={})), [Q, answer()]),
    # what is harmless
    (chat(Q, answer(prefix=False, partial=False, eot=True, end_turn=True, channel="final")), [Q, answer()]),
    (chat({"role": "user", "content": "what does <video> do?"}, answer("<image>")), None),
    (chat({"role": "user", "content": HTML}, answer(HTML)), None),
    (chat({"role": "user", "content": "a"}, answer("<video>\nis a tag of HTML, as <img>")), None),
    (chat({"role": "user", "content": "where does <img src='a'> end?"}, answer()), None),
]


@pytest.mark.parametrize(("sample", "messages"), READ)
def test_read(tmp_path, sample, messages):
    assert messages_of(tmp_path, sample) == (messages or sample["messages"])


NOTES = [  # a sample, and the note on it
    (
        chat(Q, answer("a <think> b")),
        "1 sample with <think> but no </think> in an answer (first: 1); it is learned as it stands",
    ),
    (
        chat(Q, answer("a </think> b")),
        "1 sample with </think> but no <think> in an answer (first: 1); a chat template takes what stands before it for thoughts",
    ),
    (chat(Q, answer(), label=3), 'keys that are not read: "label" (1 sample, first: 1)'),
    (chat(Q, answer(), objects=["x"]), 'keys that are not read: "objects" (1 sample, first: 1)'),
    (chat(Q, answer(), objects={"x": 1}), 'keys that are not read: "objects" (1 sample, first: 1)'),
    (chat(Q, answer(), label="sport"), 'keys that are not read: "label" (1 sample, first: 1)'),
    (
        chat(Q | {"name": "Ann"}, answer(), source="x", category="y", parallel_tool_calls=True, tool_choice="auto"),
        'keys that are not read: "category" (1 sample, first: 1), "name" (1 sample, first: 1), '
        '"parallel_tool_calls" (1 sample, first: 1), "source" (1 sample, first: 1), "tool_choice" (1 sample, first: 1)',
    ),
    (
        chat(Q, answer([{"type": "text", "text": "a", "cache": 1, "image_url": None}], tool_call_id="x")),
        'keys that are not read: "cache" (1 sample, first: 1), "tool_call_id" (1 sample, first: 1)',
    ),
    (chat(Q, answer(wieght=0)), 'keys that are not read: "wieght" (1 sample, first: 1; did you mean "weight"?)'),
]


@pytest.mark.parametrize(("sample", "note"), NOTES)
def test_notes(tmp_path, sample, note):
    assert read(write(tmp_path, [sample])).notes == [note]


def test_null_in_parquet_counts_as_absent(tmp_path):
    """A column that one row fills is null in all others, also inside of turns."""
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    absent = {"chosen": None, "images": [], "label": None, "tools": None, "odd": None}
    rows = [
        chat(Q | {"loss": None}, answer(thinking=None), system="s") | absent,
        chat({"role": "user", "content": "r"}, answer(thinking="x", loss=0.5), system=None) | absent,
    ]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "talk.parquet")
    conversations = read(tmp_path / "talk.parquet")
    first, second = (conversation.messages for conversation in conversations)
    assert first == [{"role": "system", "content": "s"}, Q, answer()]
    assert second == [{"role": "user", "content": "r"}, answer(weight=0.5, reasoning_content="x")]
    assert len(conversations.notes) == 1 and conversations.notes[0].startswith("a system text, ")


def test_integers_stay_what_they_are_at_any_length(tmp_path):
    """Those of more digits than Python takes are no obstacle where they are not learned."""
    text = json.dumps(chat(Q, answer(weight=1))).replace('"messages"', f'"id": {LONG}, "messages"')
    assert next(iter(read(write(tmp_path, text)))).messages == [Q, answer()]
    text = json.dumps(chat(Q, answer(weight=1))).replace('"weight": 1', f'"weight": {LONG}')
    assert findings(write(tmp_path, text)) == [f'sample 1 turn 2: "weight" {NUMBER}, found a number that is not finite']
    text = json.dumps(chat(Q, answer(weight=1))).replace('"weight": 1', f'"weight": {"9" * 400}')
    assert findings(write(tmp_path, text)) == [f'sample 1 turn 2: "weight" {NUMBER}, found a number']
    start = time.process_time()
    assert len(read(write(tmp_path, f'{{"id": {"9" * 3_000_000}, {text[1:].replace("9" * 400, "1")}'))) == 1
    assert time.process_time() - start < 2


def test_many_bad_samples_take_no_longer_than_good_ones(tmp_path):
    """Words that are near to a misspelt one are looked for only where the finding is printed."""
    bad = [{"conversationz": [{f"form{i}": f"x{i}", "valu": "y"}], f"k{i}": 0} for i in range(10_000)]
    bad += [{"messages": [{"role": f"asistant{i}", "contentt": "x"}]} for i in range(10_000)]
    path, start = write(tmp_path, bad), time.process_time()
    assert findings(path)[-1] == "and 29,980 more findings"
    assert time.process_time() - start < 2


def test_a_key_twice_among_many_is_found_at_once(tmp_path):
    text = "{" + ", ".join(f'"k{i}": 0' for i in [*range(100_000), 99_999]) + "}"
    start = time.process_time()
    assert findings(write(tmp_path, f"[{text}]"))[0] == 'sample 1: has "k99999" twice; one of them would be lost'
    assert time.process_time() - start < 2
