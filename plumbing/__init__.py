"""What every training script needs and no paper describes. Imports nothing but itself.

How a process begins and ends
    start           imported first of all: signals, and --help, before torch is there
    ending          what a signal or an error does to a process
    errors          InputError, the one kind of error that is shown as a single line
    config          flags: a dataclass becomes a command line
    combinations    which flags go together

Several processes
    ranks           the process group, sums and gathers over it, how a script is run
    agreement       all ranks hold the same; what rank 0 does for all
    once            what one process of a node does for all of its ranks

Data
    formats         lists of dialogues and pairs, pictures with captions
    mmeb            MMEB's 36 sets, and folders in its layout
    parquet         the tables that MMEB consists of
    lines           long lists, of which only the places of their lines are kept
    first_pass      each example is tried once; what --skip-bad skips
    retrieval       evaluation sets from files; Recall@k
    images          where pictures are; a file as upright RGB, as model inputs
    zips            pictures in the hub's zip files
    inputs          what users pass to `encode`
    sampling        which dialogues a step takes
    loader          batches made ahead of time, in worker processes

A row of tokens
    template        what a model's chat template writes around a text; parts of a row
    rendering       runs a chat template, with limits: it is a program of others

The model
    hub             downloads
    folders         a model's folder: what it may hold, how it is written
    weights         a folder becomes model and processor, and back
    adapters        LoRA, in peft's format
    families        what differs between families of MLLMs
    kernels         many small calls of a GPU become few large ones
    last_layer      its MLP, only for the tokens that are read
    card            the README.md of a model's folder

A training step
    optim           AdamW, Muon, learning rates, the step itself
    losses          variants of InfoNCE from other papers
    blocks          a loss over many rows, a block in memory at a time
    precision       full float32 where the numbers need it
    replay          the same random numbers a second time
    memory          chunks, out of memory, a frozen tower's remembered output
    graphs          how many chunks keep their graph of GradCache's first pass
    sharding        FSDP2

What is written
    files           ordinary files, opened safely
    writing         files that are whole or not there
    locks           one process at a time
    outfolder       OUT, found fit before any work
    checkpoint      saving, resuming, what is the same run
    log             the line on the screen, log.jsonl
    table           the evaluation's table
    score_file      its JSON, and going on with it
"""
