"""Examples -> token ids, and which of them are to be learned.

A template writes an example as text in which the answers are known; encoding.py makes ids of it. An example is one
document, or several where no single text holds each of its answers behind the prompt that inference would give.
"""

from collections.abc import Sequence
from dataclasses import replace

from minitune.data.chat_template import named
from minitune.data.chats import scripts
from minitune.data.encoding import Document, Piece, Script, encoded
from minitune.data.examples import Chat, Completion, Example, Instruction, Text, as_chat, only_answer, texts
from minitune.data.objects import RowError
from minitune.errors import UserError
from minitune.tokenizer import GivesUp, Tokenizer

__all__ = ["Document", "documents", "documents_of", "instruction_ids", "only_answer", "prompt_ids", "texts"]

Draft = list[Piece] | Script  # the text of one document


def documents(example: Example, template: str, tokenizer: Tokenizer, train_on_prompt: bool = False) -> list[Document]:
    """The documents of an example, each of which holds something to learn.

    Args:
        template: auto | alpaca | chat, for instructions and chats; other examples stand as they are.
        train_on_prompt: learn every token but bos.

    Raises:
        RowError: the template refuses the example, or it holds nothing to learn.
        UserError: the tokenizer has no chat template, and one is needed.
    """
    [found] = documents_of([example], template, tokenizer, train_on_prompt)
    if isinstance(found, RowError):
        raise found
    return found


def documents_of(
    examples: Sequence[Example], template: str, tokenizer: Tokenizer, train_on_prompt: bool = False
) -> list[list[Document] | RowError]:
    """`documents` of each example, or what it would raise of a row; the tokenizer is called once for all of them."""
    written = [drafts_or_error(example, template, tokenizer, train_on_prompt) for example in examples]
    made = iter(encoded_of([drafts for drafts in written if isinstance(drafts, list)], tokenizer))
    found: list[list[Document] | RowError] = []
    for drafts in written:
        these = drafts if isinstance(drafts, RowError) else next(made)
        if isinstance(these, RowError):
            found.append(these)
            continue
        if train_on_prompt:
            these = [with_prompt(document, tokenizer) for document in these]
        found.append([document for document in these if document.learns] or RowError("nothing to learn"))
    return found


def encoded_of(written: list[list[Draft]], tokenizer: Tokenizer) -> list[list[Document] | RowError]:
    """The documents of each example's drafts, encoded all at once; example by example where one of them is too much
    for the tokenizer, so that this one alone is lost."""
    try:
        made = iter(encoded([draft for drafts in written for draft in drafts], tokenizer))
        return [[document for _ in drafts for document in next(made)] for drafts in written]
    except GivesUp as error:
        if len(written) == 1:
            return [RowError(str(error))]
    return [found for drafts in written for found in encoded_of([drafts], tokenizer)]


def prompt_ids(example: Example, template: str, tokenizer: Tokenizer) -> list[int]:
    """The ids before the first one that is learned: what the model is given when its answer is wanted."""
    first = documents(example, template, tokenizer)[0]
    return first.ids[: first.trained.index(True)]


def instruction_ids(instruction: str, input: str, template: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a prompt for generation: those of an `Instruction` with this instruction and input."""
    try:
        return prompt_ids(Instruction(instruction, input, "-"), template, tokenizer)  # any answer: it is not looked at
    except RowError as error:
        raise UserError(f"the instruction cannot be asked: {error}") from None


# ---- examples -> drafts --------------------------------------------------------------------------------------------


def drafts_or_error(
    example: Example, template: str, tokenizer: Tokenizer, train_on_prompt: bool
) -> list[Draft] | RowError:
    try:
        drafts = written(example, template, tokenizer)
        return [all_of_it(drafts)] if train_on_prompt else drafts
    except RowError as error:
        return error
    except RecursionError:  # JSON that could just be read, and not be written down again
        return RowError("it is too deeply nested")


def written(example: Example, template: str, tokenizer: Tokenizer) -> list[Draft]:
    """Write an example in a template."""
    refuse_bos(example, tokenizer)
    match example:
        case Text(text=text):
            return [[Piece(text, trained=True, ends=True)]]
        case Completion(prompt=prompt, completion=completion):
            return [[Piece(prompt), Piece(completion, trained=True, ends=True)]]
        case Instruction() if template == "chat":
            return [*scripts(as_chat(example), tokenizer)]
        case Instruction():
            return [alpaca_pieces(example)]
        case Chat() if template == "alpaca":
            return [alpaca_chat_pieces(example)]
        case Chat():
            return [*scripts(example, tokenizer)]


def all_of_it(drafts: list[Draft]) -> Draft:
    """The one draft of an example whose every token is to be learned, so that no seam matters."""
    if len(drafts) > 1:
        raise RowError(
            "is written otherwise by the chat template turn after turn, so that data.train_on_prompt would learn some "
            "turns several times; set it to false"
        )
    [draft] = drafts
    return replace(draft, answers=()) if isinstance(draft, Script) else draft


def with_prompt(document: Document, tokenizer: Tokenizer) -> Document:
    begins = tokenizer.bos_id is not None and document.ids[:1] == [tokenizer.bos_id]
    return replace(document, trained=[not (begins and place == 0) for place in range(len(document.ids))])


def refuse_bos(example: Example, tokenizer: Tokenizer) -> None:
    """A bos written in a row would become the token, and begin a second text in the middle of one."""
    bos = tokenizer.special_tokens.get("bos_token")
    if not bos or not any(bos in text for text in texts(example)):
        return
    why = f"holds {bos!r}, which would become the token that begins a document"
    for number, turn in enumerate(example.turns if isinstance(example, Chat) else ()):
        if bos in turn.text + turn.more + turn.written:
            raise RowError(why, named(turn, number))
    raise RowError(f"its text {why}")


def alpaca_prompt(instruction: str, input: str = "") -> str:
    given = f"### Input:\n{input}\n\n" if input else ""
    return f"### Instruction:\n{instruction}\n\n{given}### Response:\n"


def alpaca_pieces(example: Instruction) -> list[Piece]:
    """The system's text, then each prompt and its answer, with an eos after the answer."""
    now = (alpaca_prompt(example.instruction, example.input), example.output)
    between = f"{example.system}\n\n" if example.system else ""
    written: list[Piece] = []
    for prompt, answer in [*((alpaca_prompt(asked), answer) for asked, answer in example.history), now]:
        written += [Piece(between + prompt), Piece(answer, trained=True, ends=True)]
        between = "\n\n"
    return written


def alpaca_chat_pieces(chat: Chat) -> list[Piece]:
    """The same of a conversation."""
    if chat.tools or any(turn.role == "tool" or '"tool_calls"' in turn.more for turn in chat.turns):
        raise RowError('it uses tools, for which the alpaca template has no place; set data.template = "chat"')
    for number, turn in enumerate(chat.turns):
        if '"reasoning_content"' in turn.more:
            raise RowError("has no place in the alpaca template", f"{named(turn, number)}.reasoning_content")
    written: list[Piece] = []
    between = ""
    for turn in chat.turns:
        if turn.role == "system":
            between = f"{turn.text}\n\n"
        elif turn.role == "user":
            written.append(Piece(between + alpaca_prompt(turn.text)))
        else:
            written.append(Piece(turn.text, turn.train, ends=True))
            between = "\n\n"
    return written
