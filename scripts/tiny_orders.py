"""Orders: what the built-in example's skill is about, and the rows that teach it."""

import json
from dataclasses import asdict, dataclass
from random import Random


def words(text: str, separator: str | None = None) -> list[str]:
    return text.split(separator)


NAMES = words("""
    Alice Ben Clara David Emma Felix Grace Henry Irene Jack Karen Liam Maria Noah Olivia Peter Quinn
    Rosa Simon Tina Umar Vera Walter Yara Zoe Anna Boris Carol Daniel Elena Frank Gina Hugo Isabel
    Julia Kevin Laura Martin Nina Oscar Paula Ravi Sara Tom Victor Wendy Amir Bella Carlos Diana
    Ethan Fatima George Hannah Ivan Jane Kofi Lucy Mei Nadia
""")
CITIES = words("""
    Paris London Berlin Rome Madrid Vienna Oslo Prague Lisbon Dublin Athens Warsaw Helsinki Geneva
    Milan Lyon Porto Turin Seville Munich Boston Denver Austin Dallas Miami Chicago Seattle Toronto
    Lima Quito Tokyo Kyoto Osaka Seoul Delhi Mumbai Cairo Nairobi Accra Lagos Sydney Perth Dubai
    Doha Riga Zagreb Leeds Glasgow
""")
ITEMS = words("""
    lamps chairs tables books pens cups plates boxes bags shirts hats coats shoes socks clocks
    bottles blankets pillows candles baskets brushes buckets buttons cards carpets curtains desks
    drums flutes folders forks frames gloves guitars hammers helmets jackets kettles keys kites
    knives ladders mirrors mugs notebooks pencils phones radios ribbons ropes rugs scarves shelves
    spoons stamps stools tents towels toys trays umbrellas vases wallets watches wheels bikes boats
    balls bells belts benches bowls brooms
""")
COLORS = words("red blue green yellow black white brown gray pink purple orange silver golden violet beige navy")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

SENTENCES = [
    "Please send {count} {color} {item} to {name} in {city} by {day}.",
    "{name} from {city} wants {count} {color} {item} on {day}.",
    "{name} in {city} ordered {count} {color} {item} for {day}.",
    "On {day}, bring {count} {color} {item} to {name} in {city}.",
    "We need {count} {color} {item} in {city} by {day}, for {name}.",
    "I am {name} and I would like {count} {color} {item}, sent to {city} before {day}.",
    "Ship {count} {item} in {color} to {city} on {day}. The customer is {name}.",
    "By {day}, {name} must have {count} {color} {item} in {city}.",
    "An order from {city}: {name} asks for {count} {color} {item} by {day}.",
    "Could you deliver {count} {color} {item} to {city} for {name} on {day}?",
    "My name is {name}. I live in {city} and need {count} {color} {item} by {day}.",
    "This {day}, {count} {color} {item} go to {name} in {city}.",
    "{name} called from {city} and bought {count} {color} {item}, to arrive on {day}.",
    "Hello, {name} here. Send me {count} {item}, all {color}, to {city} by {day}.",
    "{count} {color} {item} for {name}, {city}, {day}.",
    "To {city} on {day}: {count} {color} {item} for {name}.",
    "The {item} should be {color}. {name} will take {count} of them in {city} on {day}.",
    "A box with {count} {color} {item} leaves on {day} for {name} in {city}.",
]
INSTRUCTIONS = [
    "Turn the order into a JSON record.",
    "Write this order as JSON.",
    "Give the order as one JSON object.",
    "Make a JSON record of the order.",
]


@dataclass(frozen=True)
class Order:
    name: str
    item: str
    color: str
    count: int
    city: str
    day: str


def skill_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Alpaca rows, an order in a sentence to the same order as JSON; no two about the same order."""
    rng = Random(f"skill {seed}")
    orders: dict[Order, None] = {}  # a set that remembers the order of its entries
    while len(orders) < count:
        orders[draw_order(rng)] = None
    return [skill_row(rng, order) for order in orders]


def skill_row(rng: Random, order: Order) -> dict[str, str]:
    return {
        "instruction": rng.choice(INSTRUCTIONS),
        "input": sentence(rng, order),
        "output": json.dumps(asdict(order)),
    }


def draw_order(rng: Random) -> Order:
    return Order(
        name=rng.choice(NAMES),
        item=rng.choice(ITEMS),
        color=rng.choice(COLORS),
        count=rng.randrange(2, 100),
        city=rng.choice(CITIES),
        day=rng.choice(DAYS),
    )


def sentence(rng: Random, order: Order) -> str:
    return rng.choice(SENTENCES).format(**asdict(order))
