"""`python -m benchmarks.adapters`: the table of adapters x backbones x lines of the adapters' contract, as Markdown."""

from tests.adapters.contract import main

if __name__ == "__main__":
    main()
