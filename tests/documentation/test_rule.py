"""Each command of the documentation is run by a test, or its page says which hardware or time it needs."""

import pytest

PAGE = """\
# A page

Type `expertrag train --gin_file=a.gin` and later `make clean`; `expertrag train` alone, `expertrag index
--retriever=MODEL_DIR` and `expertrag infer --index_dir=...` are no more than names of commands.

```bash
# nothing to type
expertrag index --corpus=a.tsv \\
    --index_dir="runs/a # b"     # an index
for edition in 1 2; do
    expertrag infer --output=$edition.jsonl
done
```

    expertrag mine --output=b.jsonl   # in a block without a label
    what it prints

| step | command |
|---|---|
| 1 | `python -m tasks.almanac.two_hop_files --output_dir=c`, `make clean` again |

```gin
OPTIMIZER = @optimizer.adamw  # make all of it again
```

```python
print("a program")
```

<!-- not run: needs a cluster
     with Slurm -->
```bash
srun expertrag train
```
"""


def test_every_command_of_the_documentation_is_run_or_marked(documentation, pages, small):
    problems = [f"{page} is not there." for page in small.PAGES if page not in documentation]
    for page, text in documentation.items():
        problems += pages.covered(pages.commands(page, text), small.PAGES.get(page, {}))[1]
    assert not problems, "\n".join(problems)


def test_what_is_run_elsewhere_is_the_same_command_in_the_same_order(documentation, pages, small):
    def pairs(page):
        return pages.covered(pages.commands(page, documentation[page]), small.PAGES[page])[0]

    for page in small.PAGES:
        places = {}
        for command, entry in pairs(page):
            if isinstance(entry, small.SameAs):
                run = [other.words for other, how in pairs(entry.page) if not isinstance(how, small.SameAs)]
                assert command.words in run, f"{command} is not a command of {entry.page}"
                places.setdefault(entry.page, []).append(run.index(command.words))
            else:
                assert page in small.DEMO_PAGES | small.FILE_PAGES, f"{command}: no test walks through this page"
        assert all(order == sorted(order) for order in places.values()), page


def test_a_command_that_is_neither_run_nor_marked_is_reported_with_its_page_and_line(pages):
    entries = {"expertrag train --gin_file=a.gin": "", "expertrag index": "", "expertrag serve": ""}
    pairs, problems = pages.covered(pages.commands("docs/new.md", PAGE), entries)
    assert [command.line for command, _ in pairs] == [3, 8]
    assert [problem.partition(": this command is neither")[0] for problem in problems] == [
        "docs/new.md:3: make clean",
        "docs/new.md:10: for edition in 1 2; do expertrag infer --output=$edition.jsonl done",
        "docs/new.md:15: expertrag mine --output=b.jsonl",
        "docs/new.md:20: python -m tasks.almanac.two_hop_files --output_dir=c",
        'docs/new.md:27: print("a program")',
        "No command of the page begins with 'expertrag serve', as its entry does.",
    ]


def test_the_commands_of_a_page_are_found_as_they_are_typed(pages):
    found = pages.commands("docs/new.md", PAGE)
    assert [command.text for command in found[2:4]] == [
        'expertrag index --corpus=a.tsv --index_dir="runs/a # b"',
        "for edition in 1 2; do\n    expertrag infer --output=$edition.jsonl\ndone",
    ]
    assert [command.language for command in found] == ["bash"] * 6 + ["python", "bash"]
    assert (found[-1].text, found[-1].not_run) == ("srun expertrag train", "needs a cluster with Slurm")
    assert all(command.not_run is None for command in found[:-1])


def test_a_mark_names_what_is_needed_and_holds_for_the_next_block_alone(pages):
    block = "```bash\nmake soak\n```\n"
    with pytest.raises(pages.PageError, match=r"docs/new.md:3: .* must begin with 'needs' or 'takes'"):
        pages.commands("docs/new.md", f"# A\n\n<!-- not run: too boring -->\n{block}")
    first, second = pages.commands("docs/new.md", f"Type:\n<!-- not run: takes an hour -->\n{block}\n{block}")
    assert (first.not_run, second.not_run) == ("takes an hour", None)


def test_a_block_that_cannot_be_read_is_reported(pages):
    with pytest.raises(pages.PageError, match="docs/new.md:1: this block is not closed"):
        pages.commands("docs/new.md", "```bash\nmake demo\n")
    with pytest.raises(pages.PageError, match="docs/new.md:2: this is not a statement of bash"):
        pages.commands("docs/new.md", "```bash\nfor i in 1 2; do\n```\n")


def test_bash_says_what_a_statement_starts(runner, tmp_path):
    started = runner.started_by(tmp_path, 'for i in 1 2; do TOLD=$i expertrag infer "--output=a $i"; done; echo b > c')
    assert [arguments for arguments, _ in started] == [["expertrag", "infer", f"--output=a {i}"] for i in (1, 2)]
    assert [environment["TOLD"] for _, environment in started] == ["1", "2"]
    assert (tmp_path / "c").read_text() == "b\n"


def test_a_command_that_fails_fails_its_test(runner, tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)ended with \[2\]:.*no command 'trian'"):
        runner.run(tmp_path, "expertrag trian")
    with pytest.raises(AssertionError, match="ended with 3"):
        runner.run(tmp_path, "exit 3")
