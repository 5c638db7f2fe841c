# SPDX-License-Identifier: Apache-2.0
"""What the pages name exists: links, files, modules, commands and launch files."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ('*.md', 'CHANGELOG.rst', 'docs/*.md', 'models/*/*.md')
    for path in ROOT.glob(pattern)
)
FOLDERS = 'bench|config|docs|launch|models|requirements|scripts|test|tts_policy'
COMMANDS = {command.name for command in entry_points(group='console_scripts')}


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r'^#+ (.*)', page.read_text(encoding='utf-8'), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def exists(name: str) -> bool:
    """Whether a file or folder of that name is there; a word in capitals stands for any."""
    return any(any(ROOT.glob(like)) for like in (name, re.sub('[A-Z]{3,}', '*', name)))


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest) -> Path:
    """Every page in turn."""
    return ROOT / request.param


def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r'\]\(([^)\s]+)\)', page.read_text(encoding='utf-8')):
        if '://' in link:
            continue
        name, _, anchor = link.partition('#')
        target = page.parent / name if name else page
        assert target.exists(), f'{page.name}: {link} leads nowhere'
        assert not anchor or anchor in anchors(target), f'{page.name}: no heading for {link}'


def test_files_and_modules_exist(page: Path) -> None:
    text = page.read_text(encoding='utf-8')
    for name in re.findall(rf'(?<![\w/.-])(?:{FOLDERS})/[\w/*.-]*\w', text):
        assert exists(name), f'{page.name}: {name} does not exist'
    for name in re.findall(r'\btts_policy(?:\.[a-z]\w*)+', text):
        parts = name.split('.')
        candidates = [ROOT.joinpath(*parts[:end]) for end in (len(parts), len(parts) - 1)]
        assert any(path.is_dir() or path.with_suffix('.py').is_file() for path in candidates), (
            f'{page.name}: {name} does not exist'
        )


def test_commands_and_launch_files_exist(page: Path) -> None:
    text = page.read_text(encoding='utf-8')
    started = re.findall(r'^    ([a-z]+_[a-z_]+) ', text, re.MULTILINE)
    for command in started + re.findall(r'ros2 run tts_policy (\w+)', text):
        assert command in COMMANDS, f'{page.name}: the package has no command {command}'
    for name in re.findall(r'\b\w+\.launch\.py', text):
        assert (ROOT / 'launch' / name).is_file(), f'{page.name}: no launch file {name}'


def test_every_maintenance_task_names_at_most_three_files_and_an_example() -> None:
    text = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| (an? [\w ]+) \| (.*) \| (.*) \| (.*) \|$', text, re.MULTILINE)
    assert len(rows) == 7
    for task, files, example, test in rows:
        named = re.findall(r'`([\w/.]+/[\w/.]*)`', files)
        assert 1 <= len(named) <= 3, task
        assert all(map(exists, named)), task
        assert re.findall(r'`[\w/.]+/[\w/.]+`|`[\w.]+`', example), task
        assert exists(test.strip('`')), task
