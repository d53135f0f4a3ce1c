"""The keys of a data file that change what a sample means: a closed table. Each is read, or refused by name.

Every other key is passed over with a note. A key whose value is null counts as absent.
"""

from typing import NamedTuple

# ---- what is learned: on an answer, or beside the turns for all answers of the sample

TRAINED = (  # true or 1: learn it; false or 0: do not; another number from 0 up: the weight of its tokens
    "train",  # axolotl, and this toolkit's own word
    "training",  # axolotl
    "train_on_turn",  # axolotl configurations
    "trainable",
    "do_train",
    "weight",  # OpenAI, mistral-finetune, Together, Fireworks
    "loss",  # ms-swift, xtuner
    "loss_scale",  # ms-swift
    "loss_weight",  # LLaMA-Factory
    "loss_mask",  # verl, and step_loss_mask of slime: what the loss is multiplied with
    "step_loss_mask",
)
MASKED = ("masked", "is_masked", "ignore")  # torchtune: true or 1 hides the answer from the loss

# ---- other things that the file says of a turn or of a sample

THOUGHTS = (
    "reasoning_content", "reasoning", "thinking", "thought", "thoughts", "reasoning_text", "thinking_content", "cot", "chain_of_thought"
)  # fmt: skip
SYSTEM = (
    "system",
    "system_prompt",
    "system_message",
    "systemPrompt",
    "system_instruction",
    "system_instructions",
    "systemInstruction",
)
TOOLS = ("tools", "functions")
CALLS = ("tool_calls", "function_call")
MEDIA = tuple(f"{what}{form}" for what in ("image", "audio", "video") for form in ("s", "", "_path", "_paths", "_url", "_urls"))
MEDIA_PARTS = (  # types of parts of a content
    *("image", "image_url", "input_image"),
    *("audio", "audio_url", "input_audio"),
    *("video", "video_url"),
    *("file", "input_file"),
)
BOXES = {"objects": ("ref", "bbox")}  # ms-swift: what stands in a picture, and takes the place of words in the turns
THOUGHT_PARTS = {"thinking": ("thinking", "text"), "reasoning": ("reasoning", "text")}  # type of a part -> where its text is

# ---- what is refused, in one line for the whole file

PAIRS = (
    "chosen",
    "rejected",
    *(f"{which}_{what}" for which in ("chosen", "rejected") for what in ("response", "messages", "conversations", "output", "answer")),
    "preferred_output",  # OpenAI
    "non_preferred_output",
)
MARKS = ("label", "kto_tag")  # true or false, also as 1 or 0; a label of another kind is a class, which is no matter here


class Refusal(NamedTuple):
    """why: what is said of it, after its count and its name. harmless: values that change nothing."""

    why: str
    harmless: tuple = ()


TRAINS_TEXT = "this trains on text only; remove these samples, or what they show and its placeholders"
PREFERENCES = Refusal(
    "a better and a worse answer, which preference training (DPO) needs: to learn the better ones, put each behind its "
    'prompt into "messages" and remove these keys'
)
GOOD_OR_BAD = Refusal(
    "answers marked as good or bad, which preference training (KTO) needs: to learn the good ones, keep the samples "
    "where it is true and remove the key"
)
SHOWN_MEDIA = Refusal(f"images, sound or video: {TRAINS_TEXT}")
PARTS_OF_TURNS = Refusal('parts of a turn cannot be learned, an answer as a whole can: mark it with "train" instead')
UNFINISHED = 'answers are learned with their end; finish them, or mark them with "train": false, and remove the key'
THINKING_SWITCH = Refusal("each answer is laid out with the thoughts that it has; remove the key")

REFUSED_BESIDE = {
    "mask": Refusal(
        "NeMo's word for the roles that are not learned; only answers are: remove the key, and mark answers that are not "
        'to be learned with "train": false'
    ),
    "chat_template": Refusal("the model's own chat template is used; remove the key"),
    "chat_template_kwargs": Refusal("the model's own chat template is used with its defaults; remove the key", ({},)),
    "enable_thinking": THINKING_SWITCH,
    **dict.fromkeys(THOUGHTS, Refusal("put the thoughts on the answer that they belong to", ("", []))),
    **dict.fromkeys(CALLS, Refusal("put the calls on the answer that makes them", ("auto", "none", "required", "", []))),
}
REFUSED_ON_TURNS = {
    "train_detail": PARTS_OF_TURNS,
    "training_detail": PARTS_OF_TURNS,
    "label": Refusal('an answer marked as good or bad: say it with "train": true or false'),
    "mask": Refusal('it may mean both, learn and do not learn: say it with "train": true or false'),
    "prefix": Refusal(UNFINISHED, (False, "")),  # DeepSeek, Mistral: the answer goes on
    "partial": Refusal(UNFINISHED, (False,)),  # Qwen, Moonshot
    "eot": Refusal(UNFINISHED, (True,)),  # torchtune: false leaves out the end of the turn
    "end_turn": Refusal(UNFINISHED, (True,)),
    "channel": Refusal('put thoughts into "reasoning_content" of their answer, and calls into "tool_calls"', ("final", "")),
    "reasoning_details": Refusal('write the thoughts as one text into "reasoning_content"', ([], "")),
}

# ---- the table by key: what each one is


def _kinds(**keys) -> dict[str, str]:
    return {key: kind for kind, names in keys.items() for key in names}


BESIDE_TURNS = _kinds(
    learn=TRAINED + MASKED,
    system=SYSTEM,
    tools=TOOLS,
    media=MEDIA,
    boxes=BOXES,
    pairs=PAIRS,
    marks=MARKS,
    refused=REFUSED_BESIDE,
    read=("id",),
)
BESIDE_SINGLE = BESIDE_TURNS | _kinds(thoughts=THOUGHTS)  # beside a single question and answer
ON_TURN = _kinds(
    learn=TRAINED + MASKED,
    thoughts=THOUGHTS,
    calls=CALLS,
    tools=TOOLS,
    media=MEDIA,
    refused=REFUSED_ON_TURNS,
    refusal=("refusal",),
    result=("tool_call_id",),
)
ALL = sorted({*BESIDE_SINGLE, *ON_TURN, "input", "history"} - {"id"})  # what a key that is not read may misspell


LEAST, MOST = 1e-6, 1e6  # of a weight that is not 0: what float32 adds up without losing it


def weight_of(key: str, value: object) -> float | None:
    """What a key of TRAINED or MASKED says: the weight of an answer's tokens; None where the value says nothing."""
    if not isinstance(value, bool | int | float):
        return None
    if key in MASKED:
        return 1.0 - value if value in (0, 1) else None
    try:
        weight = float(value)
    except OverflowError:
        return None
    return weight if weight == 0 or LEAST <= weight <= MOST else None


def one_weight(said: dict[str, object]) -> float | None:
    """What several such keys say together; None where they contradict. said: key -> value, each good for weight_of.

    True is no contradiction to a number above 0: the one says that, the other how much.
    """
    weights = {key: weight_of(key, value) for key, value in said.items()}
    numbers = {weight for key, weight in weights.items() if not isinstance(said[key], bool) or not weight}
    if len(numbers) > 1 or (0.0 in numbers and any(weights.values())):
        return None
    return numbers.pop() if numbers else 1.0
