# SPDX-License-Identifier: Apache-2.0
"""What the package promises about itself: version, commands, installed files, headers."""

from __future__ import annotations

import ast
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from setuptools import Distribution

# Setuptools brings distutils where Python has none, so it has to be imported first.
from distutils.core import run_setup  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
LICENCE_LINE = '# SPDX-License-Identifier: Apache-2.0'
SOURCE_FOLDERS = ('bench', 'launch', 'scripts', 'test', 'tts_policy')
ROS_MODULES = {
    'ament_index_python',
    'builtin_interfaces',
    'diagnostic_msgs',
    'launch',
    'launch_ros',
    'lifecycle_msgs',
    'rcl_interfaces',
    'rclpy',
    'rosgraph_msgs',
    'sensor_msgs',
    'std_msgs',
    'std_srvs',
    'trajectory_msgs',
}


def python_files(*folders: str) -> list[Path]:
    """All Python files of the given folders of the repository, and those at its root."""
    files = list(ROOT.glob('*.py')) if folders == SOURCE_FOLDERS else []
    return sorted(files + [path for folder in folders for path in (ROOT / folder).rglob('*.py')])


def imported_modules(path: Path) -> Iterator[str]:
    """Top-level names of every module a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (name.name.partition('.')[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.partition('.')[0]


@pytest.fixture(scope='module')
def manifest() -> ElementTree.Element:
    """The root element of package.xml."""
    return ElementTree.parse(ROOT / 'package.xml').getroot()


@pytest.fixture(scope='module')
def distribution() -> Distribution:
    """What setup.py hands to setuptools; nothing is built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return run_setup('setup.py', stop_after='init')


def test_the_version_is_the_same_everywhere(
    manifest: ElementTree.Element, distribution: Distribution
) -> None:
    version = manifest.findtext('version')
    assert distribution.get_version() == version
    changelog = (ROOT / 'CHANGELOG.rst').read_text(encoding='utf-8')
    newest = re.search(r'^(Forthcoming|\d+\.\d+\.\d+)\b.*\n-+$', changelog, re.MULTILINE)
    assert newest[1] in ('Forthcoming', version)


def test_the_manifest_names_the_package_and_its_build_type(manifest: ElementTree.Element) -> None:
    assert manifest.get('format') == '3'
    assert manifest.findtext('name') == 'tts_policy'
    assert manifest.findtext('export/build_type') == 'ament_python'
    assert {url.get('type') for url in manifest.findall('url')} == {
        'website',
        'repository',
        'bugtracker',
    }


def test_the_requirements_of_a_ros_workspace_leave_its_setuptools_alone() -> None:
    base = (ROOT / 'requirements' / 'base.txt').read_text(encoding='utf-8')
    assert not re.search(r'^setuptools\b', base, re.MULTILINE)


def test_the_manifest_declares_every_ros_package_that_is_imported(
    manifest: ElementTree.Element,
) -> None:
    declared = {element.text for element in manifest.findall('exec_depend')}
    imported = {
        module
        for path in python_files('tts_policy', 'launch')
        for module in imported_modules(path)
    }
    assert imported & ROS_MODULES <= declared


def test_every_command_leads_to_a_function_of_the_package(distribution: Distribution) -> None:
    commands = dict(line.split(' = ') for line in distribution.entry_points['console_scripts'])
    assert set(commands) >= {'policy_node', 'robot_node', 'demo'}
    for target in commands.values():
        module, _, function = target.partition(':')
        path = ROOT / f'{module.replace(".", "/")}.py'
        assert path.is_file(), f'{target}: {path} does not exist'
        tree = ast.parse(path.read_text(encoding='utf-8'))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        last = ast.unparse(tree.body[-1])
        assert last.startswith("if __name__ == '__main__'"), f'python -m {module} would do nothing'


def test_everything_a_user_edits_or_loads_is_installed(distribution: Distribution) -> None:
    installed = {
        f'{folder}/{Path(path).name}': path
        for folder, paths in distribution.data_files
        for path in paths
    }
    expected = {
        'share/ament_index/resource_index/packages/tts_policy': 'resource/tts_policy',
        'share/tts_policy/package.xml': 'package.xml',
    }
    for pattern in ('launch/*.launch.py', 'config/*', 'models/*/*'):
        found = [path.relative_to(ROOT) for path in ROOT.glob(pattern) if path.is_file()]
        assert found, f'the repository has no {pattern}'
        expected |= {f'share/tts_policy/{path}': str(path) for path in found}
    assert installed == expected


def test_templates_are_installed_with_the_modules_that_use_them(
    distribution: Distribution,
) -> None:
    patterns = distribution.package_data['']
    files = [path for path in (ROOT / 'tts_policy').rglob('*') if path.is_file()]
    templates = [path for path in files if path.suffix not in ('.py', '.pyc')]
    assert ROOT / 'tts_policy/data/report.html.j2' in templates
    for path in templates:
        assert any(path.match(pattern) for pattern in patterns), f'{path} is not installed'


def test_templates_are_installed_with_the_package(distribution: Distribution) -> None:
    patterns = distribution.package_data['']
    kept = {path for path in (ROOT / 'tts_policy').rglob('*') if path.is_file()}
    data = {path for path in kept if path.suffix not in ('.py', '.pyc')}
    assert data
    assert all(any(path.match(pattern) for pattern in patterns) for path in data), data


def test_every_python_file_begins_with_the_licence_line() -> None:
    without = [
        str(path.relative_to(ROOT))
        for path in python_files(*SOURCE_FOLDERS)
        if path.read_text(encoding='utf-8').partition('\n')[0] != LICENCE_LINE
    ]
    assert not without


def test_every_python_file_is_named_by_what_it_holds() -> None:
    vague = {'utils', 'util', 'helpers', 'helper', 'misc', 'common'}
    assert not [path for path in python_files(*SOURCE_FOLDERS) if path.stem in vague]


def test_every_direct_requirement_is_pinned_once() -> None:
    pins: dict[str, list[str]] = {}
    for path in (ROOT / 'requirements').glob('*.txt'):
        for line in path.read_text(encoding='utf-8').splitlines():
            requirement, _, _ = line.partition('#')
            if not requirement.strip():
                continue
            pin, _, marker = (part.strip() for part in requirement.partition(';'))
            assert '==' in pin, f'{path.name}: {line!r} names no exact version'
            name = re.split(r'[\[=]', pin, maxsplit=1)[0].lower()
            pins.setdefault(name, []).append(marker)
    twice = {name for name, markers in pins.items() if len(set(markers)) != len(markers)}
    assert not twice
