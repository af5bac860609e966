"""Running a chat template, a program out of a folder that nobody vouches for, on a budget of work and memory.

Jinja's sandbox keeps a template from reaching Python; it does not keep it from counting to 10^12 or writing a
terabyte. Here each template is metered: its syntax tree is rewritten once, so that every loop pays for its body each
time round, every macro for each call, and every operation whose cost or result grows with its operands pays first
for what it will look at and write. meters.py counts, prices.py says what a filter or a method costs. The same template
on the same conversation always pays the same, on any machine.
"""

import json
import re
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import SecurityError
from jinja2.visitor import NodeTransformer

from minitune.data.meters import BUDGET, STEP, Meters, TooMuch
from minitune.data.prices import METHODS, priced_filters, priced_tests
from minitune.errors import UserError
from minitune.secrets import shortened

MARKS = {"generation_opens": "\0<", "generation_closes": "\0>"}  # no text of a row holds a NUL
LENGTH = 100_000  # characters of a template; those in use have up to 30,000
Body = nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block  # what may run more than once


class ChatTemplate:
    """A compiled chat template; its `render` may be called whoever wrote it."""

    def __init__(self, source: str) -> None:
        """Raises UserError if the source is no template, or none that can be run."""
        if len(source) > LENGTH:
            raise UserError(f"the tokenizer's chat template has {len(source):,} characters; {LENGTH:,} are the most")
        self.meters = environment()
        try:
            tree = self.meters.parse(source)
            self.names = names(tree)
            self.template = self.meters.from_string(Meter().visit(tree))
        except jinja2.TemplateSyntaxError as error:
            where = f"has an error in line {error.lineno}: {short(error.message or '')}"
            raise UserError(f"the tokenizer's chat template {where}") from None
        except (SyntaxError, RecursionError, MemoryError, OverflowError, ValueError) as error:
            raise UserError(f"the tokenizer's chat template cannot be run: {short(str(error))}") from None

    def render(self, **variables: Any) -> str:
        """The text that the template makes of `variables` (messages, tools, ...).

        Raises:
            UserError: it tries what a sandbox forbids, or more work than a chat template could need.
            Exception: anything that the template itself raises.
        """
        with self.meters.lock:  # the budget is that of one rendering
            self.meters.left, self.meters.conversation = BUDGET, variables
            try:
                return self.template.render(variables)
            except (TooMuch, RecursionError):
                raise UserError(
                    "the tokenizer's chat template asks for far more work than a chat template needs, and is not run; "
                    "do not trust the folder that it came with"
                ) from None
            except SecurityError as error:
                what = short(str(error))
                raise UserError(f"the tokenizer's chat template tries what no chat template may: {what}") from None


def names(tree: nodes.Template) -> frozenset[str]:
    """The names that a template speaks of: variables, attributes, keys."""
    variables = (node.name for node in tree.find_all(nodes.Name))
    attributes = (node.attr for node in tree.find_all(nodes.Getattr))
    keys = (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
    return frozenset([*variables, *attributes, *keys])


def environment() -> Meters:
    """What transformers offers to templates, at a price."""
    meters = Meters(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"])
    meters.filters = priced_filters(meters, meters.filters | {"tojson": to_json})
    meters.tests = priced_tests(meters, meters.tests)
    meters.methods = METHODS
    meters.code_generator_class = Generator
    meters.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    del meters.globals["lipsum"]  # nonsense of any length
    return meters


class GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}: what is inside, between MARKS for who asks for them."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opens, closes = (nodes.Output([nodes.Name(name, "load")], lineno=line) for name in MARKS)
        return nodes.Scope([opens, *inside, closes], lineno=line)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(format: str) -> str:
    if re.search(r"%[^A-Za-z%]*\d", format) or len(format) > 1000:
        raise TooMuch  # a width
    return datetime.now().strftime(format)


def short(text: str) -> str:
    """What a template says, fit for a line of a terminal."""
    return "".join(c if c.isprintable() else " " for c in shortened(text, 300))


# ---- the syntax tree, metered --------------------------------------------------------------------------------------


class Meter(NodeTransformer):
    """Puts the sandbox's meters, which are filters that a template cannot spell, into a template's syntax tree."""

    def body(self, node: Any) -> nodes.Node:
        """A loop, macro or block pays for what it does each time it runs."""
        each_time = [*node.body, *getattr(node, "else_", ()), *getattr(node, "defaults", ())]
        weight = STEP + sum(map(cost, each_time))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(meter("pay", nodes.Const(weight), at=node), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = body

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.test is not None:  # what it lets through pays in the body; what it does not, here
            paid = meter("pay", nodes.Const(cost(node.test)), at=node)
            node.test = nodes.And(paid, node.test, lineno=node.lineno)
        return self.body(node)

    def elsewhere(self, node: nodes.Node) -> nodes.Node:
        raise jinja2.TemplateSyntaxError("a chat template is one file, and cannot ask for others", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = elsewhere

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        for place, child in enumerate(node.nodes):
            if not (plain(child) or isinstance(child, nodes.TemplateData)):
                node.nodes[place] = meter("shown", child, at=node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [weighed(child) for child in node.nodes]
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = weighed(node.key)  # it is hashed
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = meter("copied", node.node, at=node)
        else:
            node.arg = weighed(node.arg)  # it is hashed
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if len(node.ops) > 1:
            node.expr = weighed(node.expr)
            for operand in node.ops:
                operand.expr = weighed(operand.expr)
            return node
        [operand] = node.ops
        if operand.op in ("in", "notin"):
            few = isinstance(operand.expr, nodes.List | nodes.Tuple) and all(map(plain, operand.expr.items))
        else:
            few = plain(node.expr) or plain(operand.expr)
        return node if few else meter(operand.op, node.expr, operand.expr, at=node)

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        terms: list[Any] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):  # a + b + c + ..., in one call
            terms.insert(0, self.visit(left.right))
            left = left.left
        return meter("add", self.visit(left), *terms, at=node)

    def arithmetic(self, node: nodes.BinExpr) -> nodes.Node:
        self.generic_visit(node)
        return meter(node.operator, node.left, node.right, at=node)

    visit_Mul = visit_Pow = visit_Mod = visit_Div = visit_FloorDiv = arithmetic


class Generator(CodeGenerator):
    """Writes the two commonest meters in line: a call of each would take longer than what it measures."""

    def visit_ExprStmt(self, node: nodes.ExprStmt, frame: Frame) -> None:
        [units] = node.find_all(nodes.Const)
        self.writeline(f"environment.left -= {units.value}", node)
        self.writeline("if environment.left < 0:")
        self.indent()
        self.writeline("environment.overdraw()")
        self.outdent()

    def visit_Filter(self, node: nodes.Filter, frame: Frame) -> None:
        if node.name != "<shown>":
            return super().visit_Filter(node, frame)
        self.write("(shown if type(shown := (")  # a text is paid for by `concat`
        self.visit(node.node, frame)
        self.write(")) is str else environment.weighed(shown))")


def meter(name: str, value: nodes.Expr, *others: nodes.Expr, at: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, f"<{name}>", list(others), [], None, None, lineno=at.lineno)


def weighed(node: nodes.Expr) -> nodes.Expr:
    return node if plain(node) else meter("weighed", node, at=node)


def plain(node: nodes.Node) -> bool:
    """Whether a value is a constant or a truth, at which to look costs next to nothing."""
    return isinstance(node, nodes.Const | nodes.Compare | nodes.Not | nodes.Test)


def cost(node: nodes.Node) -> int:
    """What running a node takes, the bodies in it left out: these pay for themselves."""
    own = STEP
    if isinstance(node, nodes.TemplateData):
        own += len(node.data)
    elif isinstance(node, nodes.Const) and isinstance(node.value, str):
        own += len(node.value)
    left_out = ("body",) if isinstance(node, Body) else ()
    return own + sum(map(cost, node.iter_child_nodes(exclude=left_out)))
