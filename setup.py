# SPDX-License-Identifier: Apache-2.0
"""Build of the ament_python package, for colcon and for pip alike."""

import os
from glob import glob

from setuptools import find_packages, setup

PACKAGE = 'tts_policy'
URL = 'https://github.com/tts-policy/tts_policy'
SHARE = f'share/{PACKAGE}'


def below_share(*patterns: str) -> list[tuple[str, list[str]]]:
    """List the files that match, each to be installed under SHARE in the folder it has here."""
    folders: dict[str, list[str]] = {}
    for pattern in patterns:
        for path in sorted(glob(pattern)):
            if os.path.isfile(path):
                folders.setdefault(os.path.join(SHARE, os.path.dirname(path)), []).append(path)
    return sorted(folders.items())


setup(
    name=PACKAGE,
    version='0.1.0',
    description='Diffusion policies with test-time sparsity on ROS 2',
    url=URL,
    project_urls={'Source': URL, 'Tracker': f'{URL}/issues'},
    license='Apache-2.0',
    maintainer='tts_policy maintainers',
    maintainer_email='maintainers@tts-policy.org',
    python_requires='>=3.10',
    packages=find_packages(include=[PACKAGE, f'{PACKAGE}.*']),
    package_data={'': ['*.html.j2']},
    data_files=[
        ('share/ament_index/resource_index/packages', [f'resource/{PACKAGE}']),
        (SHARE, ['package.xml']),
        *below_share('launch/*.launch.py', 'config/*', 'models/*/*'),
    ],
    extras_require={
        'test': ['pytest'],
        'ray': ['ray'],
        'datasets': ['zarr', 'numcodecs', 'pyarrow', 'av'],
    },
    zip_safe=False,
    entry_points={
        'console_scripts': [
            'policy_node = tts_policy.node.policy_node:main',
            'robot_node = tts_policy.sim.robot_node:main',
            'collect_demos = tts_policy.sim.collect:main',
            'train_policy = tts_policy.train.train_policy:main',
            'train_pruner = tts_policy.train.train_pruner:main',
            'evaluate_bag = tts_policy.data.evaluate_bag:main',
            'play_bag = tts_policy.node.play_bag:main',
            'record_bag = tts_policy.node.record_bag:main',
            'convert_checkpoint = tts_policy.convert.convert_checkpoint:main',
            'evaluate_policy = tts_policy.evaluate.evaluate_policy:main',
            'demo = tts_policy.sim.demo.command:main',
        ],
    },
)
