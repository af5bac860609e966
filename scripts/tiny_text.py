"""The text that the built-in base model is taught.

Short English-like documents about people, orders, animals and sums, many of which say one thing twice: so
a small model learns to copy, and to find a color or a city in a sentence. Words coined on the spot stand
among them, which can only be copied. No document holds a JSON object or an `### Instruction`: that is left
to learn.
"""

import string
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from random import Random

from tiny_orders import CITIES, COLORS, DAYS, ITEMS, NAMES, Order, draw_order, sentence, words

ANIMALS = words("cat dog horse cow sheep goat hen duck fox wolf bear lion mouse rabbit bird fish frog bee ant owl")
PLACES = words("""
    house garden school park market shop station river forest hill bridge road kitchen office harbor
    library museum church farm beach tower square field lake
""")
QUALITIES = words("""
    big small old new good bad long short happy sad quick slow warm cold quiet loud clean heavy
    light bright dark strong kind brave tired hungry young round soft
""")
VERBS = words("""
    walked ran looked talked smiled waited worked played slept jumped danced sang cooked laughed
    stopped listened turned climbed traveled stayed
""")
WEATHER = words("It was raining|The sun was shining|The wind was strong|Snow was falling|The sky was clear", "|")
TIMES = words("in the morning|in the evening|at noon|at night|after lunch|before dinner|last week|yesterday", "|")
HEADINGS = words("Memo Order Note News List Table Facts Letter Summary Record Answer Today")
SMALL = words("zero one two three four five six seven eight nine ten eleven twelve")
ANY_WORD = NAMES + CITIES + ITEMS + COLORS + DAYS + ANIMALS + PLACES + QUALITIES + VERBS
SIGNS = string.ascii_letters + string.digits + string.punctuation + "éèüñöäßç€£°\u2013\u2018\u2019\u201c\u201d\u2026"
ONSETS = words("b c d f g h j k l m n p r s t v w z br cr dr fl gr kl pl pr sh sk sl st th tr")
RIMES = words("a e i o u ai ea ou an en in on ar er ir or al el il as es is at et ost ind ulk arm")


def documents(count: int, seed: int) -> Iterator[str]:
    """`count` documents of about 30 words each; equal seeds give equal documents."""
    rng = Random(f"documents {seed}")
    makers, weights = zip(*KINDS, strict=True)
    for _ in range(count):
        yield rng.choices(makers, weights)[0](rng)


# Orders: a sentence, and the same facts told again in another shape.


def draw_odd_order(rng: Random) -> Order:
    """An order in which some words are coined, so that they can only be copied, not guessed."""
    order = draw_order(rng)
    coined = {
        "name": coin(rng).capitalize(),
        "city": coin(rng).capitalize(),
        "item": coin(rng) + "s",
        "color": coin(rng),
    }
    return replace(order, **{key: word for key, word in coined.items() if rng.random() < 0.2})


def coin(rng: Random) -> str:
    return "".join(rng.choice(ONSETS) + rng.choice(RIMES) for _ in range(rng.randint(1, 3)))


def order_told_again(rng: Random) -> str:
    """A sentence or two, then the facts of each in some shapes of `RECORDS`, keys in any order."""
    orders = [draw_odd_order(rng) for _ in range(rng.choice([1, 1, 1, 2]))]
    leads = ["", "", f"{heading(rng)}\n", "A new order came in. ", f"{rng.choice(WEATHER)}. ", "Note: "]
    text = rng.choice(leads) + rng.choice([" ", "\n"]).join(sentence(rng, order) for order in orders)
    records = rng.choices(RECORDS, k=rng.randint(1, 3))
    parts = [record(rng, shuffled_facts(rng, order)) for record in records for order in orders]
    between = rng.choice(["\n", "\n", "\n\n", f"\n\n{heading(rng)}\n"])
    return text + between + "\n".join(parts)


def heading(rng: Random) -> str:
    return rng.choice(["#", "##", "###", "###", "###"]) + " " + rng.choice(HEADINGS) + rng.choice(["", ":"])


def record_told_again(rng: Random) -> str:
    """One record in two shapes, the keys in two different orders."""
    order = draw_odd_order(rng)
    first, second = rng.choice(RECORDS), rng.choice(RECORDS)
    return first(rng, shuffled_facts(rng, order)) + "\n" + second(rng, shuffled_facts(rng, order))


def shuffled_facts(rng: Random, order: Order) -> list[tuple[str, str]]:
    """Some or all of the keys and values, in a random order."""
    facts = [(key, str(value)) for key, value in asdict(order).items()]
    rng.shuffle(facts)
    return facts if rng.random() < 0.6 else facts[: rng.randint(2, 5)]


def as_memo(rng: Random, facts: list[tuple[str, str]]) -> str:
    mark = rng.choice(["", "", "- ", "* "])
    return "\n".join(f"{mark}{key}: {value}" for key, value in facts)


def as_settings(rng: Random, facts: list[tuple[str, str]]) -> str:
    return "\n".join(f"{key} = {value}" if value.isdigit() else f'{key} = "{value}"' for key, value in facts)


def as_call(rng: Random, facts: list[tuple[str, str]]) -> str:
    values = ", ".join(value if value.isdigit() else f'"{value}"' for _, value in facts)
    return f"({', '.join(key for key, _ in facts)})\n({values})"


def as_table(rng: Random, facts: list[tuple[str, str]]) -> str:
    return " | ".join(key for key, _ in facts) + "\n" + " | ".join(value for _, value in facts)


def as_prose(rng: Random, facts: list[tuple[str, str]]) -> str:
    told = [f"the {key} is {value}" for key, value in facts]
    return f"So {', '.join(told[:-1])} and {told[-1]}."


def as_questions(rng: Random, facts: list[tuple[str, str]]) -> str:
    ask = rng.choice(["What is the {}?", "And the {}?", "Tell me the {}.", "Which {}?"])
    return "\n".join(f"{ask.format(key)} {value.capitalize()}." for key, value in facts)


def as_words(rng: Random, facts: list[tuple[str, str]]) -> str:
    return "\n".join(f'The {key}? "{value}"' for key, value in facts)


RECORDS = [as_memo, as_settings, as_settings, as_call, as_table, as_prose, as_questions, as_words]


# Prose, letters, talk, lists.


def story(rng: Random) -> str:
    name, friend = rng.sample(NAMES, 2)
    animal, place = rng.choice(ANIMALS), rng.choice(PLACES)
    city, color = rng.choice(CITIES), rng.choice(COLORS)
    quality, other = rng.sample(QUALITIES, 2)
    lines = [
        f"{rng.choice(WEATHER)} {rng.choice(TIMES)}.",
        f"{name} {rng.choice(VERBS)} to the {place} with a {quality} {animal}.",
        f"{friend} {rng.choice(VERBS)} near the {place} and saw {name}.",
        f"The {animal} was {color} and very {other}.",
        f"{name} and {friend} {rng.choice(VERBS)} together {rng.choice(TIMES)}.",
        f'"Is this your {animal}?" said {friend}. "Yes, it is my {quality} {animal}," said {name}.',
        f"Then they {rng.choice(VERBS)} back to {city}, and the {color} {animal} {rng.choice(VERBS)} too.",
        f"{friend} gave {name} {rng.randint(2, 20)} {rng.choice(COLORS)} {rng.choice(ITEMS)}.",
        f"Everyone in {city} knows the {quality} {place} and the {color} {animal} of {name}.",
    ]
    chosen = sorted(rng.sample(range(len(lines)), rng.randint(3, 7)))
    return " ".join([f"{name} lived in {city}.", *(lines[i] for i in chosen)])


def letter(rng: Random) -> str:
    order, writer = draw_odd_order(rng), rng.choice(NAMES)
    quality, other = rng.sample(QUALITIES, 2)
    body = [
        f"thank you for your letter from {order.city}.",
        f"I have {order.count} {order.color} {order.item} for you.",
        f"They will come on {order.day} {rng.choice(TIMES)}.",
        f"Is {order.day} a good day? Please tell me before the {order.item} leave.",
        f"My {rng.choice(ANIMALS)} is {quality} and the {rng.choice(PLACES)} is {other}.",
    ]
    said = " ".join(line[0].upper() + line[1:] for line in rng.sample(body, rng.randint(2, 5)))
    return f"Dear {order.name},\n{said}\nYours,\n{writer}\n\nTo: {order.name}, {order.city}\nFrom: {writer}"


def talk(rng: Random) -> str:
    order, other = draw_odd_order(rng), rng.choice(NAMES)
    return "\n".join(
        [
            f'{other}: "{sentence(rng, order)}"',
            f'{order.name}: "{order.color.capitalize()} {order.item}?"',
            f'{other}: "Yes, {order.color} {order.item}, {order.count} of them."',
            f'"{order.city}," said {order.name}. "{order.day} in {order.city}."',
        ][: rng.randint(2, 4)]
    )


def shopping_list(rng: Random) -> str:
    items = rng.sample(ITEMS, rng.randint(3, 6))
    lines = [f"- {rng.randint(2, 40)} {rng.choice(COLORS)} {item}" for item in items]
    again = rng.sample(lines, len(lines))
    owner = rng.choice(NAMES)
    return "\n".join([f"List of {owner}:", *lines, f"The same list for {owner}:", *again])


def table(rng: Random) -> str:
    orders = [draw_odd_order(rng) for _ in range(rng.randint(2, 4))]
    keys = rng.sample(list(asdict(orders[0])), rng.randint(2, 4))
    rows = [[str(asdict(order)[key]) for key in keys] for order in orders]
    told = "; ".join(f"{rows[i][0]} has {keys[1]} {rows[i][1]}" for i in range(len(rows)))
    return " | ".join(keys) + "\n" + "\n".join(" | ".join(row) for row in rows) + f"\n{told}."


def opinion(rng: Random) -> str:
    place, animal, (good, bad) = rng.choice(PLACES), rng.choice(ANIMALS), rng.sample(QUALITIES, 2)
    return (
        f"What does a {animal} like? A {animal} likes a {good} {place}. It does not like a {bad} {place}. "
        f"Why? Because a {bad} {place} is not {good}. How many {rng.choice(ITEMS)} are in the {place}? "
        f"There are {rng.choice(SMALL)}. So the {animal} {rng.choice(VERBS)} {rng.choice(TIMES)}."
    )


# Patterns: copies, sums, the alphabet, code.


def echo(rng: Random) -> str:
    """Random words said again, whole, in reverse or in quotes: nothing but copying helps."""
    pool = rng.choice([NAMES, CITIES, ITEMS, ANIMALS, ANY_WORD, ANY_WORD])
    told = [rng.choice(pool) if rng.random() < 0.8 else coin(rng) for _ in range(rng.randint(4, 16))]
    if rng.random() < 0.2:
        told = [word.capitalize() for word in told]
    line, quoted = " ".join(told), ", ".join(f'"{word}"' for word in told)
    shapes = [
        [f"again: {line}"] * 3,
        [line, line],
        [line, quoted],
        [quoted, line],
        [*told, "", *told],
        [line, f"backwards: {' '.join(reversed(told))}"],
        [f"first {told[0]}, last {told[-1]}: {line}"],
    ]
    return "\n".join(rng.choice(shapes))


def signs(rng: Random) -> str:
    """Single characters a line, said again, so that the token of each is trained."""
    told = rng.choices(SIGNS, k=rng.randint(4, 16))
    return "\n".join(told + told)


def pairs(rng: Random) -> str:
    """Keys and values, then some of the keys asked for: the answer stands beside the key above."""
    keys = rng.sample(rng.choice([NAMES, ITEMS, ANIMALS, PLACES, CITIES]), rng.randint(3, 6))
    values = [rng.choice([coin(rng), rng.choice(COLORS), str(rng.randrange(100))]) for _ in keys]
    sign = rng.choice([": ", " = ", " is ", " -> "])
    known = dict(zip(keys, values, strict=True))
    return "\n".join(f"{key}{sign}{known[key]}" for key in keys + rng.sample(keys, len(keys)))


def sums(rng: Random) -> str:
    lines = []
    for _ in range(rng.randint(2, 6)):
        a, b = sorted((rng.randint(0, 20), rng.randint(0, 20)), reverse=True)
        shapes = [f"{a} + {b} = {a + b}", f"{a} - {b} = {a - b}", f"{a} and {b} make {a + b}"]
        lines.append(rng.choice(shapes))
    return rng.choice(["\n", ". ", "; "]).join(lines) + "."


def counting(rng: Random) -> str:
    start, step = rng.randint(0, 60), rng.choice([1, 1, 1, 2, 5, 10])
    numbers = [str(start + step * i) for i in range(rng.randint(5, 12))]
    first = rng.randint(0, 18)
    letters = [chr(ord("a") + first + i) for i in range(rng.randint(4, 8))]
    shapes = [
        "Count: " + ", ".join(numbers),
        "Letters: " + " ".join(letters),
        "Letters: " + " ".join(letters).upper(),
        "Words: " + ", ".join(SMALL[: rng.randint(3, 13)]),
        "Days: " + ", ".join((DAYS * 2)[(shift := rng.randrange(7)) : shift + 7]),
    ]
    return "\n".join(rng.sample(shapes, 2))


def code(rng: Random) -> str:
    """Lines like a program's, where braces, brackets and quotes have a use that is not JSON."""
    thing, other = rng.sample(ITEMS, 2)
    limit, color, name = rng.randint(2, 99), rng.choice(COLORS), rng.choice(NAMES)
    lines = [
        f"{thing} = {limit}",
        f"if ({thing} > {limit}) {{ send({thing}); }}",
        f"for {thing[:-1]} in {other}\n{{\n  paint({color});\n  send({thing[:-1]});\n}}",
        f'print("{name} has {limit} {color} {thing}");',
        f'owner = "{name}"; say("{name}");',
        f"def pack({thing}): return {thing} + {other}  # {color}",
        f"while ({other} < {limit})\n{{\n  {other} = {other} + 1;\n}}",
        f"{{{thing}, {other}}} and {{{other}, {color}}}",
        f'{other}[{limit}] = "{color}"',
        f"<{thing}>{color}</{thing}>",
    ]
    return "\n".join(rng.sample(lines, rng.randint(3, 6)))


KINDS: list[tuple[Callable[[Random], str], int]] = [
    (order_told_again, 30),
    (record_told_again, 8),
    (story, 12),
    (letter, 6),
    (talk, 7),
    (shopping_list, 4),
    (table, 4),
    (opinion, 5),
    (echo, 18),
    (signs, 2),
    (pairs, 6),
    (sums, 3),
    (counting, 3),
    (code, 5),
]
