"Package metadata, all of it read from settings.ini: edit there."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
settings = config['DEFAULT']

licenses = {'apache2': 'Apache-2.0'}
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
# `dev_requirements` becomes the extra `dev`, and so on.
extras = {name.removesuffix('_requirements'): value.split() for name, value in settings.items() if name.endswith('_requirements')}
library = settings['lib_name']

setup(
    name=library,
    version=settings['version'],
    description=settings['description'],
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=settings['author'],
    author_email=settings['author_email'],
    url=settings['git_url'],
    keywords=settings['keywords'].split(),
    license=licenses[settings['license']],
    license_files=['LICENSE'],
    classifiers=[
        f'Development Status :: {statuses[int(settings["status"]) - 1]}',
        f'Intended Audience :: {settings["audience"]}',
        f'Natural Language :: {settings["language"]}',
        'Programming Language :: Python :: 3',
    ],
    python_requires=f'>={settings["min_python"]}',
    packages=find_packages(include=[library, f'{library}.*']),
    package_data={library: settings['package_data'].split()},
    install_requires=settings['requirements'].split(),
    extras_require=extras,
    entry_points={
        'console_scripts': settings['console_scripts'].split(),
        'nbdev': [f'{library}={library}._modidx:d'],  # lets other nbdev sites link to our documentation
    },
    zip_safe=False,
)
