#!/usr/bin/env python
"""Find words that the project's English avoids: ``scripts/words.py [FILE]... [--count]``.

It reads the comments, the strings and the names that are defined in ``.py`` files, and the whole text of ``.md``,
``.toml`` and ``.j2`` files. It prints ``path:line: word; write ...`` for each find, and ends in 1 if there is any.
CONTRIBUTING.md has the rules.
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".py", ".md", ".toml", ".j2")
# This list and its test quote the words.
EXCLUDED = ("scripts/words.py", "tests/unit/scripts/test_words.py")

# Pattern -> what to write instead. Names are matched as text too: an underscore or a capital begins a word.
_PERSON = "name the component"
_METAPHOR = "the plain or the field's term"
_PER = "'per rank', 'per case'"
_THINGS = "rank|case|node|host|rail|row|column|check|record|subject|result|start|expert"
BANNED = {
    r"[Ww]ho|[Ww]hoever|[Ww]hom|[Ww]homever": _PERSON,
    r"[Nn]obody|[Ss]omebody|[Ee]verybody|[Aa]nybody": _PERSON,
    r"[Hh]e|[Hh]im|[Hh]is|[Hh]imself": _PERSON,
    r"[Rr]ooms?|[Rr]oads?|[Bb]ooks?|[Dd]oors?|[Kk]nock(?:s|ed|ing)?|[Pp]ulses?": _METAPHOR,
    r"[Ww]itness(?:es|ed)?|[Ss]eats?|[Ss]eated|[Cc]laim(?:s|ed|ing)?": _METAPHOR,
    r"(?:is|are|was|were|be|been|being) told": "'reads', 'receives', 'knows'",
    r"(?:is|are) to be": "'must be', 'is'",
    r"[Aa] rank has": "'each rank has'",
    rf"[Oo]ne (?:(?!(?:of|in|to|on|for|with|at|from) )\w+ ){{1,2}}an? (?:{_THINGS})": _PER,
    rf"(?:bytes|rows|tokens|samples|seconds|times|ranks|GPUs|NICs) an? (?:{_THINGS})": _PER,
}
_BLANKS = r"\s+"  # a line may end between two words
_FIND = re.compile(
    "|".join(rf"(?P<w{k}>(?<![\w'-])(?:{pattern.replace(' ', _BLANKS)})(?![\w-]))" for k, pattern in enumerate(BANNED))
)
_INSTEAD = list(BANNED.values())
# Uses that are right: addresses, authors' names, and terms of other programs.
ALLOWED = re.compile(
    r"https?://\S+"
    r"|\b(?:K\.|Kaiming|Y\.|X\.) He\b|\bHe et al"
    r"|(?i:resource[ -]?claims?\w*|volume[ -]?claims?\w*)"
)
_FIELD = re.compile(r"\{[^{}]*\}")  # of an f-string: code, and not text
_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


@dataclass(frozen=True)
class Find:
    """A banned word at a line of a file."""

    path: str
    line: int
    word: str
    instead: str

    def __str__(self) -> str:
        """``path:line: word; write ...``."""
        return f"{self.path}:{self.line}: {self.word!r}; write {self.instead}"


def words_in(text: str) -> Iterator[tuple[int, str, str]]:
    """Each banned word in `text`: its line from 0, the word, and what to write instead."""
    cleared = ALLOWED.sub(_blank, text)
    for match in _FIND.finditer(cleared):
        index = int((match.lastgroup or "w0")[1:])
        yield cleared.count("\n", 0, match.start()), " ".join(match[0].split()), _INSTEAD[index]


def _blank(match: re.Match[str]) -> str:
    """As many characters as were matched, none of which is a word; line ends stay."""
    return re.sub(r"\S", ".", match[0])


def texts_of_python(source: str) -> Iterator[tuple[int, str]]:
    """The comments, the strings and the defined names of a module, each with the line that it begins in."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT or "STRING" in tokenize.tok_name[token.type]:
            formatted = "f" in token.string.partition('"')[0].lower()
            yield token.start[0], _FIELD.sub(_blank, token.string) if formatted else token.string
    for line, name in _defined_names(ast.parse(source)):
        yield line, _CAPITAL.sub(" ", name).replace("_", " ")


def _defined_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr


def finds(path: Path, root: Path = ROOT) -> list[Find]:
    """All banned words in a file, in the order of its lines."""
    text = path.read_text(encoding="utf-8")
    parts = texts_of_python(text) if path.suffix == ".py" else iter([(1, text)])
    name = path.resolve().relative_to(root).as_posix()
    found = [
        Find(name, line + offset, word, instead) for line, part in parts for offset, word, instead in words_in(part)
    ]
    found += [Find(name, 1, word, instead) for _, word, instead in words_in(path.stem.replace("_", " "))]
    return sorted(found, key=lambda one: one.line)


def files() -> list[Path]:
    """The files of the checkout that are checked."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [
        ROOT / name
        for name in names
        # Golden runs keep the words of the version that made them.
        if name.endswith(SUFFIXES)
        and name not in EXCLUDED
        and not name.startswith("tests/golden/")
        and (ROOT / name).exists()
    ]


def main() -> int:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="files to check; by default those of the checkout")
    parser.add_argument("--count", action="store_true", help="print the number of finds per file")
    options = parser.parse_args()
    found = [find for file in options.files or files() for find in finds(file)]
    if options.count:
        for path, count in Counter(find.path for find in found).most_common():
            print(f"{count:5} {path}")
    else:
        for find in found:
            print(find)
    if found:
        print(f"{len(found)} words to avoid; see CONTRIBUTING.md", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
