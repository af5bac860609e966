"""What a row of data says, before any prompt is made of it: four kinds of example."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """A row in Alpaca's format."""

    instruction: str
    input: str  # empty: none
    output: str
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()  # what was asked and answered before, to be learned as well
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it, both as they stand."""

    prompt: str
    completion: str
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class Turn:
    role: str  # system | user | assistant | tool
    text: str
    train: bool  # is it to be learned
    more: str = ""  # a JSON object, as text: tool_calls, reasoning_content, name, ... as chat templates know them
    written: str = ""  # the tool calls as the row writes them, for a template that has no place for tool_calls
    place: str = field(default="", compare=False)  # "messages[2]"


@dataclass(frozen=True)
class Chat:
    """A conversation: at most one system turn, first; then user and assistant in turn, tools between them."""

    turns: tuple[Turn, ...]
    tools: str = ""  # a JSON list, as text
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class Text:
    """Raw text, all of it to be learned."""

    text: str
    origin: str = field(default="", compare=False)


Example = Instruction | Completion | Chat | Text


def texts(example: Example) -> list[str]:
    """All that a person wrote in an example."""
    match example:
        case Text(text=text):
            return [text]
        case Completion(prompt=prompt, completion=completion):
            return [prompt, completion]
        case Instruction(instruction=instruction, input=input_, output=output, system=system, history=history):
            before = [*([system] if system else []), *(text for pair in history for text in pair)]
            return [*before, instruction, input_, output]
        case Chat(turns=turns, tools=tools):
            written = (text for turn in turns for text in (turn.text, turn.more, turn.written))
            return [tools, *(text for text in written if text)]


def only_answer(example: Example) -> str | None:
    """What the model is to answer, where the example has exactly one answer."""
    match example:
        case Instruction(history=()) | Completion():
            return example.output if isinstance(example, Instruction) else example.completion
        case Chat(turns=turns):
            answers = [turn.text for turn in turns if turn.train]
            return answers[0] if len(answers) == 1 and answers[0] else None
    return None


def as_chat(example: Instruction) -> Chat:
    """An instruction as a conversation, for a tokenizer's own chat template."""
    asked = example.instruction + (f"\n\n{example.input}" if example.input else "")
    turns = [Turn("system", example.system, False)] if example.system else []
    for question, answer in [*example.history, (asked, example.output)]:
        turns += [Turn("user", question, False), Turn("assistant", answer, True)]
    return Chat(tuple(turns))
