"""One sample after the other, from a JSON value to turns: which form it has, what stands beside its turns, and its turns."""

from ..data_files.window import TWICE
from . import keys, order, tool_turns
from .data_notes import Noted
from .file_findings import FileFindings, kind, quoted
from .forms import (
    CONVERSATIONS,
    HISTORY,
    LAID_OUT,
    MESSAGES,
    NO_FORM,
    OWN,
    TURNS,
    Form,
    fields_of,
    forms_of,
    forms_of_pair,
    holds_turns,
    lowered,
    question_without_answer,
)
from .messages import Conversation
from .sample_values import listed
from .tool_spellings import Unreadable, tools_in_keys
from .turns import Turn, TurnReader

MOST_BROKEN = 1000  # lines that are no JSON whose text is kept
MOST_PLANS = 1000
PREFERRED = frozenset((*keys.PAIRS, *keys.MARKS))
PLAIN_KEYS = {"id", "conversations", "messages"}
EXPECTED = 'expected "conversations" (from/value), "messages" (role/content), "instruction"/"output" or another form of data/README.md'


class SampleReader:
    """Walks through the samples of one file and keeps what is wrong with them, and what is worth a note.

    drop: what is wrong with a sample costs that sample alone, and a last question without an answer is cut off.
    """

    def __init__(self, path: str, drop: bool = False):
        self.found, self.noted, self.drop = FileFindings(path), Noted(), drop
        self.one = TurnReader(self.found, self.noted)  # reads one turn
        self.forms: dict[tuple, int] = {}  # what named() names -> first sample
        self.plans: dict[tuple, tuple[Form, tuple[str, ...]]] = {}  # keys of a sample -> its form, and the keys beside it
        self.pairs: dict[tuple, tuple[Form, ...]] = {}  # keys of a pair -> its forms
        self.broken, self.broken_lines = 0, []  # lines that are no JSON, where those are left out: (line, message, text) of the first
        self.nameless: list[str] | None = None  # the keys of a first sample that has no form and no lookalike of one

    def read(self, line: int | None, sample: object) -> Conversation | None:
        """The next sample as a conversation; None where something is wrong with it: then found.reasons says what."""
        found = self.turns_of(line, sample)
        return found and Conversation([turn.message() for turn in found[0]], found[1])

    def turns_of(self, line: int | None, sample: object) -> tuple[list[Turn], list[dict]] | None:
        """The same as turns and tools; all that is checked and noted of a sample is checked and noted here."""
        turns, tools = self.sample(line, sample)
        if not turns and not self.found.reasons:
            self.found.find("empty conversation; remove it")  # of a system turn without a text, say
        if not self.found.reasons:
            turns = order.settle(self.noted, self.found.number, turns, self.one.marked, self.drop)
            order.check(self.found, self.noted, turns)
        if self.found.reasons:
            return None
        self.noted.conversation(self.found.number, turns, tools)
        return turns, tools

    def again(self, line: int | None, sample: object) -> Conversation:
        """The next sample of a file in which nothing is wrong."""
        turns, tools = self.sample(line, sample)
        turns = order.settle(self.noted, self.found.number, turns, self.one.marked)
        return Conversation([turn.message() for turn in turns], tools)

    def broken_line(self, line: int, message: str, text: str) -> None:
        """A line that is no JSON: it is left out."""
        self.broken += 1
        if len(self.broken_lines) < MOST_BROKEN:
            self.broken_lines.append((line, message, text))

    def sample(self, line: int | None, sample: object) -> tuple[list[Turn], list[dict]]:
        """The turns and the tools of the next sample; none where there are findings about it that hide the rest."""
        found = self.found
        found.next(line)
        if isinstance(sample, list) and holds_turns(sample):
            sample = {"messages": sample}  # a bare list of turns
        if not isinstance(sample, dict):
            found.find(f'must be an object with "conversations", found {kind(sample)}')
            return [], []
        if sample.keys() <= PLAIN_KEYS and (sample.get("conversations") is None) != (sample.get("messages") is None):
            form = MESSAGES if sample.get("conversations") is None else CONVERSATIONS
            return self._whole(sample, form, {})
        names = tuple(sample)
        if (plan := self.plans.get(names)) and None not in sample.values():
            form, others = plan
            return self._whole(sample, form, self._beside({key: sample[key] for key in others}, form) if others else {})
        found.once(sample)
        sample = {key: value for key, value in sample.items() if value is not None and key is not TWICE}
        forms = forms_of(sample)
        if not forms and (small := lowered(sample)) and (forms := forms_of(small)):
            sample = small
        form = self._one_form(sample, forms)
        beside = self._beside(sample, form)  # kind of key -> what stands beside the turns
        if self._is_preference(beside):
            return [], []
        if form is None:
            self._no_form(sample, forms)
            return [], []
        self._plan(names, sample, form, forms)
        return self._whole(sample, form, beside)

    def _plan(self, names: tuple, sample: dict, form: Form, forms: list[Form]) -> None:
        """Remembers the form of samples with these keys, where the keys alone decide: next time that is a look into a table."""
        doubtful = any(key in TURNS and key not in OWN for key in names) or any(key in PREFERRED for key in names)
        if len(forms) == 1 and tuple(sample) == names and not doubtful and len(self.plans) < MOST_PLANS:
            self.plans[names] = form, tuple(key for key in names if key not in (*form.keys, HISTORY, "id"))

    def _whole(self, sample: dict, form: Form, beside: dict[str, dict]) -> tuple[list[Turn], list[dict]]:
        """The turns of a form, with what stands beside them."""
        found, self.one.with_tools, self.one.tools = self.found, False, None
        if self.one.marked:
            self.one.marked = set()
        before = found.count
        turns = self._chat(sample[form.turns], form.turns) if form.turns else self._single(sample, form, beside)
        if beside and turns:
            turns = self._with_system(beside.get("system", {}), turns)
            turns = self._weighed(beside.get("learn", {}), turns)
        in_text = turns and turns[0].role == "system" and "<tools>" in turns[0].content
        if turns and (self.one.with_tools or "tools" in beside or in_text):
            tools = self._tools(beside.get("tools"), self.one.tools)
            return tool_turns.assemble(found, self.noted, turns, tools) if found.count == before else (turns, [])
        return turns, []

    def _one_form(self, sample: dict, forms: list[Form]) -> Form | None:
        """The form of a sample; of several the first, if they all say the same."""
        if len(forms) < 2:
            return forms[0] if forms else None
        said = {repr(_said(sample, form)) for form in forms}
        return forms[0] if len(said) == 1 else None

    # ---- beside the turns

    def _beside(self, sample: dict, form: Form | None) -> dict[str, dict]:
        """The keys of keys.BESIDE_TURNS that a sample has, by what they are; notes the others."""
        single = form is not None and not form.turns
        table = keys.BESIDE_SINGLE if single else keys.BESIDE_TURNS
        own = (*form.keys, HISTORY) if single else form.keys if form else ()
        beside: dict[str, dict] = {}
        for key, value in sample.items():
            what = "read" if key in own else table.get(key)
            if what is None:
                if form is not None:
                    self.noted.unread_key(self.found.number, key)
            elif what == "refused":
                if value not in keys.REFUSED_BESIDE[key].harmless:
                    self.found.refuse(keys.REFUSED_BESIDE[key], f'"{key}" beside the turns')
            elif what == "media":
                if value:
                    self.found.refuse(keys.SHOWN_MEDIA, f'"{key}"')
            elif what == "marks" and key != "kto_tag" and value not in (0, 1):  # a class, or any other label
                self.noted.unread_key(self.found.number, key)
            elif what == "boxes":
                if isinstance(value, dict) and any(value.get(part) for part in keys.BOXES[key]):
                    self.found.refuse(keys.SHOWN_MEDIA, f'"{key}"')
                elif value and (not isinstance(value, dict) or any(value.values())):
                    self.noted.unread_key(self.found.number, key)
            elif what != "read" and (what in ("learn", "marks") or value not in ("", [], {})):
                beside.setdefault(what, {})[key] = value
        return beside

    def _is_preference(self, beside: dict[str, dict]) -> bool:
        for what, refusal in (("pairs", keys.PREFERENCES), ("marks", keys.GOOD_OR_BAD)):
            for key in beside.get(what, ()):
                self.found.refuse(refusal, f'"{key}"')
        return "pairs" in beside or "marks" in beside

    def _with_system(self, said: dict[str, object], turns: list[Turn]) -> list[Turn]:
        """Puts a system text that stands beside the turns before them; it may stand there twice if it is the same."""
        texts = {key: self.one.text(value, key) for key, value in said.items()}
        if not said or None in texts.values():
            return turns
        key, text = next(iter(texts.items()))
        if len(set(texts.values())) > 1:
            self.found.find(f"has {quoted(texts)} with different texts; keep one of them")
        if turns[0].role != "system":
            return [Turn(f'"{key}"', "system", text), *turns]
        if turns[0].content not in ("", text):
            self.found.find(f'has a "{key}" and a system turn with another text; keep one')
        return [turns[0]._replace(content=text), *turns[1:]]

    def _weighed(self, said: dict[str, object], turns: list[Turn]) -> list[Turn]:
        """The answers, with their weights times that of the sample."""
        if not isinstance(said.get("loss", True), bool):
            what = '"loss" beside the turns must be true or false; a number there is usually a loss that was measured'
            self.found.find(f'{what}: remove the key, or call it "weight" if it is one')
            return turns
        weight = self.one.weight(said)
        if said:
            self.one.marked.update(turn.place for turn in turns)
        return turns if weight == 1 else [self._times(turn, weight) for turn in turns]

    @staticmethod
    def _times(turn: Turn, weight: float) -> Turn:
        if turn.role != "assistant":
            return turn
        more = dict(turn.more or {})
        product = more.pop("weight", 1.0) * weight
        return turn._replace(more=(more | {"weight": product} if product != 1 else more) or None)

    def _tools(self, beside: dict[str, object] | None, on_system: dict[str, object] | None) -> list[dict]:
        if beside and on_system:
            self.found.find("has tools beside the turns and on the system turn; keep one of them")
        try:
            return tools_in_keys(beside or on_system) if beside or on_system else []
        except Unreadable as error:
            self.found.find(str(error))
            return []

    # ---- lists of turns

    def _chat(self, messages: object, container: str) -> list[Turn]:
        messages = listed(messages)
        own = OWN.get(container)
        if not isinstance(messages, list):
            self.found.find(f'"{container}" must be a list of turns, found {kind(messages)}')
            return []
        if not messages:
            self._has_form(container, own)
            self.found.find("empty conversation; remove it")
            return []
        first = messages[0]
        if isinstance(first, str) and len(messages) > 1:
            self._has_form(container, None, "of texts in turn")
            return self._texts_in_turn(messages)
        if isinstance(first, dict) and fields_of(first) is None and len(forms_of_pair(first)) == 1:
            self._has_form(container, None, "of pairs")
            return self._pairs(messages)
        speaker, text = (fields_of(first, own) if isinstance(first, dict) else None) or own or OWN["messages"]
        self._has_form(container, (speaker, text))
        turns = [self.one.turn(f"turn {t}", message, speaker, text) for t, message in enumerate(messages, 1)]
        return [turn for turn in turns if turn]

    def _has_form(self, *form) -> None:
        if form not in self.forms:
            self.forms[form] = self.found.number

    def _texts_in_turn(self, messages: list) -> list[Turn]:
        """Question, answer, question, ... as plain texts."""
        turns = []
        for t, message in enumerate(messages, 1):
            text = self.one.text(message, "text", f"turn {t}")
            turns.append(Turn(f"turn {t}", "assistant" if t % 2 == 0 else "user", text or ""))
        return turns

    def _pairs(self, pairs: list) -> list[Turn]:
        """Each entry a question with its answer, the first one possibly with a system text."""
        turns: list[Turn] = []
        for number, pair in enumerate(pairs, 1):
            place = f"pair {number}"
            forms = self._forms_of_pair(pair) if isinstance(pair, dict) else ()
            if len(forms) != 1:
                self.found.find("must be one question and one answer, as the first pair is", place)
                continue
            said = {}
            if len(pair) > len(forms[0].keys):
                self.found.once(pair, place)
                said = {key: pair[key] for key in keys.SYSTEM if pair.get(key)}
                for key in pair:
                    if key not in forms[0].keys and key not in keys.SYSTEM and key is not TWICE and pair[key] is not None:
                        self.noted.unread_key(self.found.number, key)
            if said and turns:
                self.found.find("a system text is only allowed in the first pair", place)
            asked = [self.one.text(pair[key], key, place) for key in (forms[0].question, *forms[0].below)]
            answer = self.one.text(pair[forms[0].answer], forms[0].answer, place)
            turns += [Turn(place, "system", self.one.text(text, key, place) or "") for key, text in said.items()]
            turns.append(Turn(f"{place} question", "user", "\n".join(text for text in asked if text)))
            turns.append(Turn(f"{place} answer", "assistant", answer or ""))
        return turns

    def _forms_of_pair(self, pair: dict) -> tuple[Form, ...]:
        names = tuple(pair)
        if names not in self.pairs:
            if len(self.pairs) >= MOST_PLANS or None in pair.values():
                return forms_of_pair(pair)
            self.pairs[names] = forms_of_pair(pair)
        return self.pairs[names]

    # ---- a question and its answer

    def _single(self, sample: dict, form: Form, beside: dict) -> list[Turn]:
        """history's pairs, then the question with what is put below it, then the answer."""
        before, find, text = self.found.count, self.found.find, self.one.text
        if isinstance(sample[form.question], list) and isinstance(sample[form.answer], list):  # TRL's prompt and completion
            return self._chat([*sample[form.question], *sample[form.answer]], form.question)
        self._has_form(form.question, None, "", form.answer)
        turns = self._history(sample.get(HISTORY, []))
        question = [text(sample[key], key) for key in (form.question, *form.below)]
        answer = text(sample[form.answer], form.answer)
        thoughts = self.one.thoughts(beside.get("thoughts", {}))
        if thoughts and answer and answer.lstrip().startswith("<think>"):
            find(f'has thoughts twice ({quoted(beside["thoughts"])} and <think> in "{form.answer}"); keep one of them')
        if self.found.count > before:
            return []
        prompt = "\n".join(text for text in question if text)
        more = {"reasoning_content": thoughts} if thoughts else None
        return [*turns, Turn(f'"{form.question}"', "user", prompt), Turn(f'"{form.answer}"', "assistant", answer, more)]

    def _history(self, pairs: object) -> list[Turn]:
        pairs = listed(pairs)
        if not isinstance(pairs, list):
            self.found.find(f'"history" must be a list of [question, answer] pairs, found {kind(pairs)}')
            return []
        turns = []
        for i, pair in enumerate(pairs, 1):
            if not isinstance(pair, list) or len(pair) != 2:
                self.found.find(f"must be a [question, answer] pair, found {kind(pair)}", f"history {i}")
                continue
            for role, name, said in zip(("user", "assistant"), ("question", "answer"), pair):
                turns.append(Turn(f"history {i} {name}", role, self.one.text(said, name, f"history {i}") or ""))
        return turns

    # ---- what has no form

    def _no_form(self, sample: dict, forms: list[Form]) -> None:
        find, names = self.found.find, [key for key in sample if key is not TWICE]
        if forms:
            return find(f"has {' and '.join(map(str, forms))}, which differ; keep one of them")
        if fields_of(sample):
            return find('is a single turn; put the turns of a conversation into {"conversations": [...]}')
        for key, what in NO_FORM.items():
            if key in sample:
                laid_out = key == "text" and "<|im_start|>" in str(sample[key])
                return find(f'"{key}": {LAID_OUT if laid_out else what}')
        if single := question_without_answer(names):
            return self.found.missing(single.answers[0], sample, but=(single.question, *single.below))
        for key in names:
            guess = self.found.meant(key.lower(), OWN) if isinstance(sample[key], list) else ""
            if guess:
                return find(f'no "{guess}" (keys: {quoted(names)}); did you mean "{guess}"? Rename the key {quoted([key])}')
        if "output" in names:
            return self.found.missing("instruction", sample, but=("output", "input"))
        if self.found.number == 1:
            self.nameless = names
        find(f'no "conversations" (keys: {quoted(names)}); {EXPECTED}')


def named(key: str, pair: tuple[str, str] | None = None, what: str = "", answer: str = "") -> str:
    """A form for people: "messages" with role/content, or "question"/"answer"."""
    if answer:
        return f'"{key}"/"{answer}"'
    return f'"{key}" with {"/".join(pair)}' if pair else f'"{key}" {what}'.rstrip()


def _said(sample: dict, form: Form) -> list[object]:
    """What a form says, as far as two of them can be the same: its texts in order."""
    if not form.turns:
        return [*("\n".join(str(sample[key]) for key in (form.question, *form.below) if sample[key]),), sample[form.answer]]
    turns = listed(sample[form.turns])
    fields = fields_of(turns[0], OWN.get(form.turns)) if isinstance(turns, list) and turns and isinstance(turns[0], dict) else None
    return [turn.get(fields[1]) if isinstance(turn, dict) else turn for turn in turns] if fields else [turns]
