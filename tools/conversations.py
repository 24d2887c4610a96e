"""A dialogue as a line of a .jsonl, for the commands that write one (generate, export)."""

import sys

from plumbing.formats import IMAGE


def as_conversations(name, image, turns) -> dict:
    """A dialogue as LLaVA writes it: `plumbing.formats.parse_dialogue`, the other way round."""
    talk = []
    for question, answer in turns:
        talk.append({"from": "human", "value": question})
        talk.append({"from": "gpt", "value": answer})
    talk[0]["value"] = f"{IMAGE}\n" + talk[0]["value"]
    return {"id": name, "image": image, "conversations": talk}


if __name__ == "__main__":
    sys.exit("tools/conversations.py has no commands: tools/generate.py imports it")
