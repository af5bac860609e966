"""The budget of a chat template and what spends it: Jinja's sandbox, with meters on what may be slow or grow large.

A unit is a character read or written; an element of a list, like a node of the template's syntax tree, is STEP of
them. Whatever a template does is paid for first, by what it will look at and write.
"""

import functools
import operator
import re
import string
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from types import BuiltinMethodType
from typing import Any

from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

STEP = 32  # units
BUDGET = 8_000_000  # units for a rendering, and for each unit that the conversation weighs ...
GROWTH, GROWTH_BY_MESSAGE = 256, 4  # ... so many more: some templates look at every message for each message
BITS = 1024  # of a number that is not only added to
OF_DICTS = frozenset(dir(dict))  # attributes, which go before keys
ATOMS = frozenset({int, float, bool, type(None)})
HOLDERS = frozenset({list, tuple, type({}.keys()), type({}.values()), type({}.items())})
SPEC = re.compile(r"%(?:\([^()]*\))?[-+ #0]*[\d*]*\.?[\d*]*")  # % up to the letter that ends it


class TooMuch(Exception):
    """The budget is spent, or would be by a single number that cannot be known before."""


class Meters(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which what a template does is paid for. `methods` lists what it may call, with prices."""

    methods: Mapping[type, Mapping[str, Callable[..., Any]]]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, optimized=False)  # else jinja would compute what it can while it compiles
        self.lock = threading.Lock()
        self.left = BUDGET  # units
        self.conversation: dict[str, Any] | None = None  # what is rendered, until its growth has been granted

    # ---- paying

    def pay(self, units: int) -> bool:
        """Spend units; true, so that it may stand in a condition. Raises TooMuch when there are none left."""
        self.left -= units if units > 0 else 1  # a template may come here by map("<pay>"); it shall earn nothing
        if self.left < 0:
            self.overdraw()
        return True

    def overdraw(self) -> None:
        self.grow()
        if self.left < 0:
            raise TooMuch

    def grow(self) -> None:
        """Grant, once, what the size of the conversation is good for; few need it, so it is not measured before."""
        if self.conversation is not None:
            messages = self.conversation.get("messages")
            count = len(messages) if isinstance(messages, list) else 0
            self.left += weight_of(self.conversation, 10**10) * (GROWTH + GROWTH_BY_MESSAGE * count)
            self.conversation = None

    def deep(self, value: Any, indent: int = 0) -> int:
        """The weight of a value with all that it holds; past what is left to pay with, it is not measured on."""
        weight = weight_of(value, self.left, indent)
        if weight > self.left and self.conversation is not None:
            self.grow()
            weight = weight_of(value, self.left, indent)
        return weight

    def weighed(self, value: Any) -> Any:
        """`value`, paid for with all that it holds: it is about to be written, hashed or looked through."""
        if type(value) is str:
            self.left -= len(value)
            if self.left < 0:
                self.overdraw()
        elif type(value) not in ATOMS:
            self.pay(self.deep(value))
        return value

    def copied(self, value: Any) -> Any:
        """`value`, paid for by its length: it is about to be copied, and what it holds is not looked at."""
        kind = type(value)
        if kind is str or kind is list or isinstance(value, Sized):
            self.pay(len(value) * (1 if isinstance(value, str) else STEP))
        return value

    def concat(self, pieces: Iterable[str]) -> str:
        """What jinja makes a text of that was written in pieces, for a macro or as the whole."""
        pieces = list(pieces)
        self.pay(sum(map(len, pieces)))
        return "".join(pieces)

    def each(self, value: Any, price: int = STEP) -> Any:
        """An iterable whose elements are paid for: at once where their number is known, else as they come."""
        if isinstance(value, Sized):
            self.pay(price * len(value))
            return value
        return self.metered(value, price) if isinstance(value, Iterable) else value

    def metered(self, value: Iterable[Any], price: int) -> Iterator[Any]:
        for element in value:
            self.pay(price)
            yield element

    # ---- operators

    def add(self, *terms: Any) -> Any:
        """The sum of terms, of which texts are the rule."""
        for term in terms:
            if type(term) is not str:
                break
        else:
            self.left -= sum(map(len, terms))
            if self.left < 0:
                self.overdraw()
            return "".join(terms)
        total = terms[0]
        for term in terms[1:]:
            if type(total) not in ATOMS:
                self.copied(total)
                self.copied(term)
            total = total + term
        return total

    def arithmetic(self, run: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        """*, **, %, / or //."""
        if run is operator.mod and isinstance(left, str):
            self.pay_for_percent(left, right)
        if run is operator.mul and not (type(left) in ATOMS and type(right) in ATOMS):
            number, other = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(number, int) and isinstance(other, Sized):
                self.pay(number * len(other) * (1 if isinstance(other, str) else STEP))
        if run is operator.pow and isinstance(left, int) and isinstance(right, int):
            small(1 << min(left.bit_length() * abs(right), BITS + 1))
        small(left, right)
        return run(left, right)

    def compared(self, compare: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        """A comparison, which ends where the smaller side does."""
        if type(left) in ATOMS or type(right) in ATOMS:
            return compare(left, right)
        if type(left) is str and type(right) is str:
            self.pay(min(len(left), len(right)))
        elif not (type(left) is dict and type(right) is dict and len(left) != len(right)):
            self.pay(min(self.deep(left), self.deep(right)))
        return compare(left, right)

    def contains(self, left: Any, right: Any) -> bool:
        if type(right) is dict and type(left) is str:
            return left in right
        self.weighed(left)
        self.weighed(right)
        return left in right

    # ---- texts that say how long they become

    def pay_for_percent(self, text: str, values: Any) -> None:
        """Pay for `text % values`."""
        specs = SPEC.findall(text)
        if "*" in "".join(specs) or text.count("%(") != len(re.findall(r"%\([^()]*\)", text)):
            raise TooMuch  # a width that cannot be known before
        self.pay(len(text) + widths(specs) + self.deep(values) * (1 + text.count("%(")))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        run = super().wrap_str_format(value)
        if run is None:
            return None

        def paid(*args: Any, **kwargs: Any) -> str:
            text = value.__self__
            specs = [spec for _, name, spec, _ in string.Formatter().parse(text) if name is not None]
            if any("{" in spec for spec in specs):
                raise TooMuch  # a width that cannot be known before
            self.pay(len(text) + widths(specs) + self.deep([args, kwargs]) * (1 + len(specs)))
            return run(*args, **kwargs)

        return functools.update_wrapper(paid, value)

    # ---- attributes and calls

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`, the two commonest kinds without the sandbox's detours."""
        kind = type(obj)
        if kind is dict and attribute not in OF_DICTS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if attribute in self.methods.get(kind, ()):
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template comes here."""
        self, called = __self, __obj
        self.pay(STEP)
        owner = getattr(called, "__self__", None)
        if type(called) is BuiltinMethodType or isinstance(owner, str):
            name, kind = called.__name__, str if isinstance(owner, str) else type(owner)
            if name not in self.methods.get(kind, ()):
                raise SecurityError(f"it calls {name} of a {kind.__name__}")
            kwargs.pop("_loop_vars", None)  # what jinja hands to every call
            kwargs.pop("_block_vars", None)
            args = self.methods[kind][name](self, owner, *args, **kwargs) or args
            return called(*args, **kwargs)
        if not isinstance(called, Macro | LoopContext):  # these only pass on what they are given
            for value in (*args, *kwargs.values()):
                self.weighed(value)
        return super().call(__context, called, *args, **kwargs)


def weight_of(value: Any, limit: int, indent: int = 0) -> int:
    """What a value holds in units, as often as it holds it, as `repr` would write it; counted until past `limit`.

    indent: characters that each level of depth adds to each element, where it is written with indents.
    """
    weight, depth, level = 0, 0, [value]
    while level and weight <= limit:
        weight += (STEP + indent * depth) * len(level)
        below: list[Any] = []
        for each in level:
            kind = type(each)
            if kind is str:
                weight += len(each)
            elif kind is dict:
                weight += STEP * len(each)
                if weight <= limit:
                    below += each
                    below += each.values()
            elif kind in HOLDERS or isinstance(each, tuple | Namespace):
                weight += STEP * operator.length_hint(each, 0)
                if weight <= limit:
                    below += each._Namespace__attrs.items() if kind is Namespace else each
            elif kind not in ATOMS:
                weight += len(each) if isinstance(each, str) else STEP * operator.length_hint(each, 0)
        depth, level = depth + 1, below
    return weight


def small(*numbers: Any) -> bool:
    """True, unless a whole number has more than BITS."""
    if any(isinstance(number, int) and number.bit_length() > BITS for number in numbers):
        raise TooMuch
    return True


def widths(specs: list[str]) -> int:
    return sum(int(number) for spec in specs for number in re.findall(r"\d+", spec))
