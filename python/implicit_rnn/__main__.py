"""python -m implicit_rnn"""

from implicit_rnn.cli import main

raise SystemExit(main())
