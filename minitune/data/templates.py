"""Examples -> token ids, and which of them are to be learned.

A template writes an example as pieces of text, prompt and answer in turn; then the pieces become ids one by one. The
ids of a prompt are always those the model will see when it is asked, so nothing is ever learned across a seam.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import takewhile

from minitune.data.chat_template import rendered
from minitune.data.formats import Chat, Completion, Example, Instruction, RowError, Text, Turn
from minitune.errors import UserError
from minitune.tokenizer import Tokenizer


@dataclass(frozen=True)
class Document:
    """One example as the model meets it."""

    ids: list[int]
    trained: list[bool]  # is this token to be learned
    cut: bool = False  # its end was left out, as it was too long

    @property
    def learns(self) -> bool:
        """Whether anything is learned from it; a first token has nothing before it to be predicted from."""
        return any(self.trained[1:])


@dataclass(frozen=True)
class Piece:
    """A stretch of a document's text."""

    text: str
    trained: bool = False
    ends: bool = False  # an eos token follows it, trained as the piece is


def document(example: Example, template: str, tokenizer: Tokenizer, train_on_prompt: bool = False) -> Document:
    """The tokens of an example.

    Args:
        template: auto | alpaca | chat, for instructions and chats; other examples stand as they are.
        train_on_prompt: learn every token but bos.

    Raises:
        RowError: the template refuses the example, or it holds nothing to learn.
        UserError: the tokenizer has no chat template, and one is needed.
    """
    result = tokenize(pieces(example, template, tokenizer), tokenizer)
    if train_on_prompt:
        begins = result.ids[:1] == [tokenizer.bos_id]
        result = replace(result, trained=[not (begins and place == 0) for place in range(len(result.ids))])
    if not result.learns:
        raise RowError("nothing to learn")
    return result


def prompt_ids(example: Example, template: str, tokenizer: Tokenizer) -> list[int]:
    """The ids before the first one that is learned: what the model is given when its answer is wanted."""
    prompt = takewhile(lambda piece: not piece.trained, pieces(example, template, tokenizer))
    return tokenize(prompt, tokenizer).ids


def instruction_ids(instruction: str, input: str, template: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a prompt for generation: those of an `Instruction` with this instruction and input."""
    try:
        return prompt_ids(Instruction(instruction, input, "-"), template, tokenizer)  # any answer: it is not looked at
    except RowError as error:
        raise UserError(f"the instruction cannot be asked: {error}") from None


def only_answer(example: Example) -> str | None:
    """What the model is to answer, where the example has exactly one answer."""
    match example:
        case Instruction(output=answer) | Completion(completion=answer):
            return answer
        case Chat(turns=turns):
            answers = [turn.text for turn in turns if turn.train]
            return answers[0] if len(answers) == 1 else None
    return None


# ---- examples -> pieces --------------------------------------------------------------------------------------------


def pieces(example: Example, template: str, tokenizer: Tokenizer) -> list[Piece]:
    """Write an example in a template."""
    refuse_bos(example, tokenizer)
    match example:
        case Text(text=text):
            return [Piece(text, trained=True, ends=True)]
        case Completion(prompt=prompt, completion=completion):
            return [Piece(prompt), Piece(completion, trained=True, ends=True)]
        case Instruction() if template == "chat":
            return chat_pieces(as_chat(example), tokenizer)
        case Instruction(instruction=instruction, input=input_, output=output):
            return [Piece(alpaca_prompt(instruction, input_)), Piece(output, trained=True, ends=True)]
        case Chat() if template == "alpaca":
            return alpaca_chat_pieces(example)
        case Chat():
            return chat_pieces(example, tokenizer)


def refuse_bos(example: Example, tokenizer: Tokenizer) -> None:
    """A bos written in a row would become the token, and begin a second text in the middle of one."""
    bos = tokenizer.special_tokens.get("bos_token")
    if bos and any(bos in text for text in texts(example)):
        raise RowError(f"its text holds {bos!r}, which would become the token that begins a document")


def texts(example: Example) -> list[str]:
    """All that a person wrote in an example."""
    match example:
        case Text(text=text):
            return [text]
        case Completion(prompt=prompt, completion=completion):
            return [prompt, completion]
        case Instruction(instruction=instruction, input=input_, output=output):
            return [instruction, input_, output]
        case Chat(turns=turns, tools=tools):
            return [tools, *(turn.text for turn in turns)]


def alpaca_prompt(instruction: str, input: str = "") -> str:
    given = f"### Input:\n{input}\n\n" if input else ""
    return f"### Instruction:\n{instruction}\n\n{given}### Response:\n"


def alpaca_chat_pieces(chat: Chat) -> list[Piece]:
    """The system's text, then a prompt and an answer for each pair of turns, with an eos after each answer."""
    if chat.tools or any(turn.role == "tool" for turn in chat.turns):
        raise RowError('it uses tools, for which the alpaca template has no place; set data.template = "chat"')
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


def as_chat(example: Instruction) -> Chat:
    asked = example.instruction + (f"\n\n{example.input}" if example.input else "")
    return Chat((Turn("user", asked, False), Turn("assistant", example.output, True)))


def chat_pieces(chat: Chat, tokenizer: Tokenizer) -> list[Piece]:
    """A conversation in the tokenizer's own chat template.

    An answer is what the template writes between the prompt that asks for it and the next turn, its end-of-turn text
    included. A template that writes a turn otherwise once others follow has no such place, and the row is refused.
    """
    full = rendered(chat, len(chat.turns), False, tokenizer)
    written: list[Piece] = []
    at, answer = 0, ""
    for number, turn in enumerate(chat.turns):
        if turn.role != "assistant":
            continue
        prompt = rendered(chat, number, True, tokenizer)
        up_to = rendered(chat, number + 1, False, tokenizer)
        if not full.startswith(up_to):
            raise RowError(f"the chat template writes turn {number + 1} otherwise once others follow")
        if not up_to.startswith(prompt) or len(prompt) < at:
            raise RowError(f"the chat template does not begin turn {number + 1} as it asks for it")
        answer = up_to[len(prompt) :].rstrip()  # white space after it belongs to what follows
        if not answer:
            raise RowError(f"the chat template leaves out the answer in turn {number + 1}")
        written += [Piece(full[at : len(prompt)]), Piece(answer, turn.train)]
        at = len(prompt) + len(answer)
    if closed(answer, tokenizer):
        return [*written, Piece(full[at:])]
    return [*written[:-1], replace(written[-1], ends=True)]


def closed(answer: str, tokenizer: Tokenizer) -> bool:
    """Whether an answer, as the template wrote it, ends in a special token that closes it."""
    last = tokenizer.encode(answer)[-1]
    return last in tokenizer.stop_ids or tokenizer.decode([last]) == ""  # a special token has no text


# ---- pieces -> ids -------------------------------------------------------------------------------------------------


def tokenize(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Document:
    """The ids of each piece after those before it, and one bos at the start if the model expects it.

    The ids before a seam are those of the text before it, as at inference. If the text up to the next seam begins
    with the same ids, the rest of its ids follow; else a token would reach over the seam, and the next piece is
    encoded by itself.
    """
    ids: list[int] = []
    trained: list[bool] = []
    encode, run, start = tokenizer.encode, "", 0  # ids[start:] are those of `run`, by `encode`
    for piece in pieces:
        whole, known = encode(run + piece.text), ids[start:]
        if whole[: len(known)] == known:
            run += piece.text
            ids += whole[len(known) :]
        else:
            encode, run, start = tokenizer.encode_continuation, piece.text, len(ids)
            ids += encode(run)
        if piece.ends and ids[-1:] != [tokenizer.eos_id]:
            ids.append(tokenizer.eos_id)
        if piece.ends:
            encode, run, start = tokenizer.encode_continuation, "", len(ids)
        trained += [piece.trained] * (len(ids) - len(trained))
    if tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]:
        ids, trained = [tokenizer.bos_id, *ids], [False, *trained]
    return Document(ids, trained)
