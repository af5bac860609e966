"""Let a model go on with a text.

    python scripts/generate.py RUN_OR_MODEL --prompt TEXT [--max-new-tokens N --temperature T --seed S]

RUN_OR_MODEL is a run folder, an adapter folder, a model folder, a Hub id or "tiny". --prompt is taken as it stands;
--instruction TEXT puts it into the prompt that the run was trained with. Prints what the model adds.
"""

import argparse

from minitune import errors


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="RUN_OR_MODEL")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", metavar="TEXT")
    text.add_argument("--instruction", metavar="TEXT")
    parser.add_argument("--input", metavar="TEXT", default="", help="goes with --instruction")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    options = parser.parse_args(arguments)
    if options.max_new_tokens < 1 or not 0 <= options.temperature < float("inf"):
        parser.error("--max-new-tokens must be at least 1 and --temperature at least 0")
    if not 0 <= options.seed < 2**63:
        parser.error("--seed must be a whole number from 0 to 2^63 - 1")
    try:
        "".join(filter(None, (options.prompt, options.instruction, options.input))).encode()
    except UnicodeEncodeError:
        parser.error("the text is not valid UTF-8")
    from minitune.generate import generate, open_model, prompt_ids

    model, tokenizer, recipe = open_model(options.model)
    ids = prompt_ids(tokenizer, recipe, options.prompt, options.instruction, options.input)
    [written] = generate(model, [ids], options.max_new_tokens, tokenizer.stop_ids, options.temperature, options.seed)
    print(tokenizer.decode(written))


if __name__ == "__main__":
    errors.run(main)
