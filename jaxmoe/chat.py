"""Messages to a prompt, by the template the file carries, in a sandbox. No JAX here."""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from time import monotonic
from typing import Any, Final, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxmoe.gguf import GGUFError, GGUFFile
from jaxmoe.request import RequestError
from jaxmoe.tokenizer import Tokenizer

MAX_SECONDS: Final = 5.0

# Whatever an expression of a template can raise.
_FAULTS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TemplateError,
    TimeoutError,
    TypeError,
    ValueError,
)
_PROBES: Final[tuple[tuple[dict[str, Any], ...], ...]] = (
    ({"role": "user", "content": "a"},),
    (
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ),
)


class ChatTemplate:
    """A Jinja template of a model file, compiled once; None stands for a file that has none.

    Control tokens come from the template's own literals alone. They are marked there when it is
    compiled, so the text of a message, a tool or an argument stays plain text whatever it holds and
    wherever the template puts it, while the template's logic sees it unchanged.
    One rendering may take `max_seconds`; loops and calls are stopped then, a single filter that
    builds something huge is not.
    Raises ValueError for a template that cannot be compiled or cannot render a user's message.
    """

    def __init__(self, source: str | None, tokenizer: Tokenizer, *, max_seconds: float = MAX_SECONDS) -> None:
        self._tokenizer = tokenizer
        self._max_seconds = max_seconds
        self._marks = _ControlMarks(tokenizer.control_tokens)
        self._environment = _Environment()
        self._names = {
            name: self._marks.mark(tokenizer.token_text(token_id))
            for name, token_id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
            if token_id is not None
        }
        self._template = None if source is None else self._compile(source)
        if self._template is not None:
            self._probe()

    @staticmethod
    def from_gguf(file: GGUFFile, tokenizer: Tokenizer) -> ChatTemplate:
        """Compile `tokenizer.chat_template`; a template that cannot be used raises GGUFError."""
        source = file.get_str("tokenizer.chat_template", default=None) or None
        try:
            return ChatTemplate(source, tokenizer)
        except ValueError as error:
            raise GGUFError(file.path, None, f"'tokenizer.chat_template': {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: object,
    ) -> str:
        """The prompt as text; `kwargs` are the template's own switches, such as enable_thinking.

        Raises RequestError(param="messages") for messages the template refuses or cannot render, and
        where the file has no template.
        """
        names = {**kwargs, "tools": tools, "add_generation_prompt": add_generation_prompt}
        marked = self._render(messages, names)
        return self._marks.unmark(marked)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: object,
    ) -> list[int]:
        """The prompt as token ids, nothing added (no BOS); raises what `render` raises."""
        names = {**kwargs, "tools": tools, "add_generation_prompt": add_generation_prompt}
        marked = self._render(messages, names)
        ids: list[int] = []
        for text, control_id in self._marks.split(marked):
            ids += self._tokenizer.encode(text, parse_special=False) if text else ()
            ids += () if control_id is None else (control_id,)
        return ids

    def _compile(self, source: str) -> Template:
        environment = self._environment
        try:
            tree = environment.parse(source)
            _mark_literals(tree, self._marks)
            _watch_loops(tree)
            tree.set_environment(environment)
            return Template.from_code(environment, environment.compile(tree), environment.make_globals(None))
        except _FAULTS as error:
            raise ValueError(f"the chat template cannot be compiled: {_fault(error)}") from error

    def _probe(self) -> None:
        for number, messages in enumerate(_PROBES):
            try:
                marked = self._render(messages, {"tools": None, "add_generation_prompt": True})
            except RequestError as error:
                if number == 0:  # a template may refuse the others: no system message, say
                    raise ValueError(f"probed with a user's message: {error}") from error
                continue
            built = self._marks.find_unmarked(marked)
            if built is not None:
                raise ValueError(f"the chat template builds the control token {built!r} from pieces")

    def _render(self, messages: Sequence[Mapping[str, Any]], names: Mapping[str, object]) -> str:
        """The prompt, control tokens still marked."""
        if self._template is None:
            raise _refusal("the model file has no chat template")
        if not messages:
            raise _refusal("messages must not be empty")
        prepared = [_prepare_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
        names = {**self._names, **names, "messages": prepared}
        try:
            self._environment.start_clock(self._max_seconds)
            marked = self._template.render(names)
            marked.encode()  # a lone surrogate is no text
        except _TemplateRefusal as error:
            raise _refusal(self._marks.unmark(str(error))) from error
        except _FAULTS as error:
            what = self._marks.unmark(_fault(error))
            raise _refusal(f"the chat template cannot render these messages: {what}") from error
        return marked


class _TemplateRefusal(TemplateError):
    """A template called raise_exception."""


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox as chat templates expect it, with a limit on the time of one rendering."""

    # One power can take for ever, and no chat template needs it.
    intercepted_binops = frozenset({"**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]  # random, and without a bound
        self._clock = threading.local()

    def start_clock(self, seconds: float) -> None:
        self._clock.end = monotonic() + seconds
        self._clock.seconds = seconds

    def tick(self) -> None:
        if monotonic() > self._clock.end:
            raise TimeoutError(f"it took more than {self._clock.seconds:g} seconds")

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.tick()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        raise SecurityError(f"the operator {operator} is not allowed")


class _ControlMarks:
    """Marks that stand for control tokens while a template renders; nobody outside can write one.

    A mark is 40 random digits and 8 of the token's id: whatever a template does to text (tojson, trim,
    upper, escape, repr in an error) leaves digits alone.
    """

    def __init__(self, control_tokens: Mapping[str, int]) -> None:
        self._texts = {token_id: text for text, token_id in control_tokens.items()}
        longest_first = sorted(control_tokens, key=len, reverse=True)
        self._text = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        start = f"{secrets.randbelow(10**40):040}"
        self._marks = {text: f"{start}{token_id:08}" for text, token_id in control_tokens.items()}
        self._mark = re.compile(f"{start}([0-9]{{8}})")

    def mark(self, text: str) -> str:
        return self._text.sub(lambda found: self._marks[found[0]], text)

    def unmark(self, text: str) -> str:
        return self._mark.sub(lambda found: self._texts[int(found[1])], text)

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Pieces of plain text, each with the control token that follows it."""
        pieces = self._mark.split(text)
        for plain, number in zip(pieces[::2], [*pieces[1::2], None], strict=True):
            yield plain, None if number is None else int(number)

    def find_unmarked(self, text: str) -> str | None:
        """The first control token's text outside of the marks."""
        found = (self._text.search(plain) for plain in self._mark.split(text)[::2])
        return next((match[0] for match in found if match), None)


def _mark_literals(tree: nodes.Template, marks: _ControlMarks) -> None:
    for literal in list(tree.find_all((nodes.Const, nodes.TemplateData))):
        if isinstance(literal, nodes.TemplateData):
            literal.data = marks.mark(literal.data)
        elif isinstance(literal, nodes.Const) and isinstance(literal.value, str):
            literal.value = marks.mark(literal.value)


def _watch_loops(tree: nodes.Template) -> None:
    """Look at the clock in every turn of every loop: the sandbox itself lets nested loops run for ever."""
    for loop in list(tree.find_all(nodes.For)):
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        loop.body.insert(0, nodes.ExprStmt(tick, lineno=loop.lineno))


def _prepare_message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A message as templates expect it: content a string, arguments decoded, reasoning by one name."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise _refusal(f"{place} must be an object with a role")
    prepared = dict(message)
    prepared["content"] = _join_content(message.get("content"), place)
    if prepared.get("reasoning_content") is None and isinstance(message.get("reasoning"), str):
        prepared["reasoning_content"] = message["reasoning"]
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise _refusal(f"{place}.tool_calls must be a list of objects")
        prepared["tool_calls"] = [_decode_arguments(call) for call in calls]
    return prepared


def _join_content(content: object, place: str) -> str:
    """A string; text parts are joined with a newline, as llama.cpp and vLLM do, and null is ""."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _refusal(f"{place}.content must be a string, null or a list of text parts")
    return "\n".join(_part_text(part, f"{place}.content[{i}]") for i, part in enumerate(content))


def _part_text(part: object, place: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise _refusal(f"{place} must be a text part, got {str(kind)[:40]!r}")


def _decode_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with its arguments as an object where their JSON is one; anything else as it came."""
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(arguments, str):
        return dict(call)
    decoded = _decode_object(arguments)
    return dict(call) if decoded is None else {**call, "function": {**function, "arguments": decoded}}


def _decode_object(text: str) -> dict[str, Any] | None:
    """The JSON object in a text, {} for an empty one, None for anything that is not sound JSON."""
    try:
        decoded = json.loads(text) if text.strip() else {}
        json.dumps(decoded, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return decoded if isinstance(decoded, dict) else None


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON for a model to read, not for HTML; the parameters are those that templates use."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> NoReturn:
    raise _TemplateRefusal(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _refusal(message: str) -> RequestError:
    return RequestError(message, param="messages")


def _fault(error: BaseException) -> str:
    return str(error)[:400] or type(error).__name__
