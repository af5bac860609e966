"""What a chat template pays for jinja's filters, tests and methods; one that is not listed here cannot be used."""

import functools
import operator
from collections.abc import Callable, Iterable, Sized
from typing import Any

from jinja2.filters import make_attrgetter, make_multi_attrgetter

from minitune.data.meters import ATOMS, BITS, STEP, Meters, TooMuch, small

Run = Callable[..., Any]

ARITHMETIC = {"*": operator.mul, "**": operator.pow, "%": operator.mod, "/": operator.truediv, "//": operator.floordiv}
COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
}

# ---- filters and tests ---------------------------------------------------------------------------------------------

FREE = ("abs", "count", "d", "default", "first", "last", "length")
ONE_BY_ONE = ("batch", "items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr", "slice")
ALTOGETHER = {  # ... and the place of `attribute` among their arguments
    "dictsort": 9,
    "groupby": 0,
    "join": 1,
    "max": 1,
    "min": 1,
    "sort": 2,
    "sum": 0,
    "unique": 1,
}
TEXTS = ("capitalize", "center", "e", "escape", "float", "format", "indent", "int", "lower", "replace", "round")
TEXTS += ("safe", "string", "title", "tojson", "trim", "truncate", "upper")


def priced_filters(meters: Meters, known: dict[str, Run]) -> dict[str, Run]:
    """Those of the `known` filters that a template may use, each paid for, and the meters that `sandbox.Meter` puts
    into its syntax tree.

    Left out are filters that no chat template needs and that are slow, or differ from one time to the next: urlize,
    wordwrap, striptags, pprint, random and their like.
    """
    priced = {name: known[name] for name in FREE}
    priced["attr"] = named(meters, known["attr"])
    priced |= {name: one_by_one(meters, known[name]) for name in ONE_BY_ONE}
    priced |= {name: altogether(meters, name, known[name], place) for name, place in ALTOGETHER.items()}
    priced |= {name: of_text(meters, known[name], EXTRA.get(name)) for name in TEXTS}
    inserted: dict[str, Run] = {name: getattr(meters, name) for name in ("pay", "weighed", "copied", "add")}
    inserted |= {sign: functools.partial(meters.arithmetic, run) for sign, run in ARITHMETIC.items()}
    inserted |= {name: functools.partial(meters.compared, run) for name, run in COMPARISONS.items()}
    inserted |= {"in": meters.contains, "notin": lambda left, right: not meters.contains(left, right)}
    return priced | {f"<{name}>": run for name, run in inserted.items()}


def priced_tests(meters: Meters, known: dict[str, Run]) -> dict[str, Run]:
    """The `known` tests, those paid for that look further than at a type."""
    priced = {
        name: functools.partial(meters.compared, run) for name, run in known.items() if run in COMPARISONS.values()
    }
    priced |= {name: of_text(meters, known[name]) for name in ("lower", "upper")}
    priced |= {name: named(meters, known[name]) for name in ("filter", "test")}
    priced |= {name: of_numbers(known[name]) for name in ("odd", "even", "divisibleby")}
    return known | priced | {"in": meters.contains}


def given_first(run: Run) -> int:
    """How many arguments jinja puts before the value that is filtered: 1 where the filter asks for the environment."""
    return int(hasattr(run, "jinja_pass_arg"))


def one_by_one(meters: Meters, run: Run) -> Run:
    """A filter that takes the elements of its value in turn, and may use its other arguments for each."""
    first = given_first(run)

    @functools.wraps(run)
    def paid(*args: Any, **kwargs: Any) -> Any:
        before, value, others = args[:first], args[first], args[first + 1 :]
        price = STEP
        for other in (*others, *kwargs.values()):
            price += len(other) if type(other) is str else meters.deep(other)
            if type(other) is int:  # batches to fill, slices to make
                meters.pay(STEP * abs(other))
        return run(*before, meters.each(value, price), *others, **kwargs)

    return paid


def altogether(meters: Meters, name: str, run: Run, place: int) -> Run:
    """A filter that looks through all elements at once, or through the attribute that it fetches of each."""
    first = given_first(run)

    @functools.wraps(run)
    def paid(*args: Any, **kwargs: Any) -> Any:
        before, value, others = args[:first], args[first], args[first + 1 :]
        if not isinstance(value, Sized):
            value = list(meters.each(value))
        attribute = kwargs.get("attribute", others[place] if len(others) > place else None)
        meters.pay(len(value) * (STEP + meters.deep([*others, *kwargs.values()])))
        looked_at = value
        if attribute is not None:
            fetch = (make_multi_attrgetter if name == "sort" else make_attrgetter)(meters, attribute)
            looked_at = [fetch(element) for element in value]
        times = 1 if name in ("join", "max", "min", "unique") else len(value).bit_length()
        if name == "sum" and any(type(element) not in ATOMS for element in looked_at):
            times = len(value)  # lists, each of which is copied into the next
        meters.pay(times * meters.deep(looked_at))
        return run(*before, value, *others, **kwargs)

    return paid


def of_text(meters: Meters, run: Run, extra: Run | None = None) -> Run:
    """A filter that reads its value as text, and its other arguments once; where there are such, `extra` pays for
    what more they make it do."""
    first = given_first(run)

    @functools.wraps(run)
    def paid(*args: Any, **kwargs: Any) -> Any:
        value, others = args[first], args[first + 1 :]
        meters.weighed(value)
        if others or kwargs:
            for other in (*others, *kwargs.values()):
                meters.weighed(other)
            if extra is not None:
                extra(meters, value, *others, **kwargs)
        return run(*args, **kwargs)

    return paid


def named(meters: Meters, run: Run) -> Run:
    """A filter or test that looks a name up: the last of its arguments."""

    @functools.wraps(run)
    def paid(*args: Any) -> Any:
        meters.weighed(args[-1])
        return run(*args)

    return paid


def of_numbers(run: Run) -> Run:
    """A test that divides: the % of a text would be a format."""

    @functools.wraps(run)
    def checked(*values: Any) -> Any:
        if any(isinstance(value, str) for value in values):
            raise TypeError("a number is needed")
        return run(*values) if small(*values) else None

    return checked


def pay_indent(meters: Meters, value: Any, width: int | str = 4, *others: Any, **kwargs: Any) -> None:
    lines = 1 + len(str(value).splitlines())
    meters.pay(lines * (len(width) if isinstance(width, str) else width))


def pay_json(
    meters: Meters, value: Any, ascii: Any = None, indent: Any = None, separators: Any = None, **others: Any
) -> None:
    width = len(indent) if isinstance(indent, str) else indent or 0
    between = sum(map(len, separators)) if separators else 0
    if width > 0 or between:
        meters.pay(meters.deep(value, indent=max(width, 0) + between))


def pay_round(meters: Meters, value: Any, precision: int = 0, *others: Any, **kwargs: Any) -> None:
    if isinstance(precision, int) and abs(precision) > BITS:
        raise TooMuch
    small(value)


def pay_int(meters: Meters, value: Any, default: Any = 0, base: int = 10) -> None:
    if base != 10 and isinstance(value, str) and len(value) > BITS // 4:  # of ten, Python itself refuses long ones
        raise TooMuch


# ---- methods -------------------------------------------------------------------------------------------------------
# Each price is called as (meters, owner, *arguments); it may return other arguments to call the method with.


def looks_through(meters: Meters, owner: Any, *args: Any, **kwargs: Any) -> None:
    for value in (owner, *args, *kwargs.values()):
        meters.weighed(value)


def looks_up(meters: Meters, owner: Any, *args: Any) -> None:
    for value in args[:1]:
        meters.weighed(value)


def copies(meters: Meters, owner: Any) -> None:
    meters.copied(owner)


def shows(meters: Meters, owner: Any) -> None:
    """dict.items and its like copy nothing."""


def searches(meters: Meters, text: Any, sought: Any = "", *args: Any, **kwargs: Any) -> None:
    """May compare all of what is sought at each place: CPython is quicker than that, but not always."""
    meters.pay(len(str(text)) * (1 + len(sought or "") // 16))


def splits(meters: Meters, text: str, sep: str | None = None, *args: Any, **kwargs: Any) -> None:
    searches(meters, text, sep)
    meters.pay(STEP * text.count(sep) if sep else STEP // 2 * len(text))


def splits_lines(meters: Meters, text: str, *args: Any, **kwargs: Any) -> None:
    meters.pay(STEP * len(text))


def joins(meters: Meters, between: str, texts: Iterable[str]) -> tuple[Any, ...]:
    elements = list(meters.each(texts))
    meters.weighed(elements)
    meters.pay(len(between) * len(elements))
    return (elements,)


def replaces(meters: Meters, text: Any, old: str, new: str, *args: Any, **kwargs: Any) -> None:
    text = str(text)
    searches(meters, text, old)
    meters.pay(text.count(old) * len(new))


def pads(meters: Meters, text: Any, width: int = 80, *args: Any, **kwargs: Any) -> None:
    meters.pay(len(str(text)) + width)


EXTRA: dict[str, Run] = {
    "center": pads,
    "format": lambda meters, value, *args, **kwargs: meters.pay_for_percent(str(value), args or kwargs),
    "indent": pay_indent,
    "int": pay_int,
    "replace": replaces,
    "round": pay_round,
    "tojson": pay_json,
    "trim": searches,
}
STR_METHODS = {
    **{name: looks_through for name in dir(str) if name.startswith("is")},
    **dict.fromkeys(("lower", "upper", "title", "capitalize", "casefold", "swapcase"), looks_through),
    **dict.fromkeys(("startswith", "endswith", "removeprefix", "removesuffix"), looks_through),
    **dict.fromkeys(("find", "index", "count", "partition", "rfind", "rindex", "rpartition"), searches),
    **dict.fromkeys(("strip", "lstrip", "rstrip"), searches),
    **dict.fromkeys(("ljust", "rjust", "center", "zfill"), pads),
    **dict.fromkeys(("split", "rsplit"), splits),
    "splitlines": splits_lines,
    "join": joins,
    "replace": replaces,
}
METHODS: dict[type, dict[str, Run]] = {
    str: STR_METHODS,
    dict: {"get": looks_up, "items": shows, "keys": shows, "values": shows, "copy": copies},
    list: {"index": looks_through, "count": looks_through, "copy": copies},
    tuple: {"index": looks_through, "count": looks_through},
}
