"""What train.py stands on, one job a file. Nothing in here knows train.py.

    stream, mixture           which text each step reads
    corpus, formats           token files, and the folders that hold them
    tokenizer, vocabulary     text to ids and back
    optim                     AdamW, Muon, the schedule of their rates
    machine, parallel         device, ranks, signals; DDP and FSDP
    checkpoint, sharded       saving, loading, resuming
    log                       what a run writes beside that, and who may write there
    files, configurator       safe writes; knobs from files and the command line
    huggingface               initial weights from there
    kernels                   the numbers of tst.py and model.py, faster: skip it to learn the method

train.py can be followed without reading any of them.
"""


class UserError(Exception):
    """Something the user can act on, said in one line. Raised by libraries; an entry point prints it and
    exits with 1 (configurator.entry_point). Whatever else is raised is a bug, and gives its traceback."""
