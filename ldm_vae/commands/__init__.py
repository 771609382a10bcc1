"""The verbs of `ldm-vae`, one file each: HELP, DESCRIPTION, add_arguments(parser) and run(arguments)."""
