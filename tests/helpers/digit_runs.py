"""Runs on few digits: flags of commands, and what the commands print."""

import json

NETWORK = ("--arch", "digits_cnn", "--width", "8", "--limit", "200")
QUICK = ("--epochs", "2", "--eps", "0.1", "--objective", "fgsm-rs", "--evaluation-steps", "2")


def lines(capsys) -> list[dict]:
    """The JSON lines that were printed."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]
