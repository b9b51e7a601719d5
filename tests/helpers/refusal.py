"""How the command line refuses: what the tests of it share."""

from sparse_adv.__main__ import main


def refused(capsys, *arguments: str) -> str:
    """What a command prints that must end with exit code 2 and one sentence."""
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as end:  # argparse's own way out
        code = end.code
    message = capsys.readouterr().err
    assert code == 2 and "error:" in message and "Traceback" not in message
    return message
