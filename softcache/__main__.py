"""The entry point of `softcache` and `python -m softcache`."""

import signal


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # until the command itself handles Ctrl-C there is nothing to save, and no traceback to show
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from softcache.cli.app import main as app

    app()


if __name__ == "__main__":
    main()
