"Building an index of normal images that is killed in the middle, and what a user is told about a folder that does not fit."
import os, shutil, sys
from functools import partial
from pathlib import Path
import numpy as np
import pytest
from datasets import Dataset
from helpers import kill_when
from readl_nb.datasets import labelled
from readl_nb.references import INDEX, PARTS, ReferenceIndex, filter_bank, normals_from, pack_index, pair_references, reference_problems, unpack_index

BUILD = '''
import sys, time
import readl_nb.references as references
references.PART = 8
def slow(images):
    time.sleep(.05 * len(images))
    return references.filter_bank(images)
slow.name = 'filter_bank'
references.ReferenceIndex.build(sys.argv[2:], slow, folder=sys.argv[1], sample=(4, 500), restarts=1, progress=False)
'''

@pytest.fixture(scope='module')
def normals(root): return [row['path'] for row in labelled(root/'sample_data') if not row['label']]

def test_a_killed_build_goes_on(normals, tmp_path, monkeypatch):
    "kill -9 after the first stored part; the same call finishes it, does not repeat what is there, and finds what an undisturbed build finds"
    folder = tmp_path/'index'
    kill_when(lambda: any((folder/PARTS).glob('*.safetensors')), [sys.executable, '-c', BUILD, folder, *normals])
    there = {file: file.stat().st_mtime_ns for file in (folder/PARTS).glob('[0-9]*.safetensors')}
    assert there and not (folder/INDEX).exists(), 'it was killed too early or too late'
    seen = []
    def counted(images): seen.append(len(images)); return filter_bank(images)
    counted.name = 'filter_bank'
    monkeypatch.setattr('readl_nb.references.PART', 8)
    options = dict(sample=(4, 500), restarts=1, progress=False)
    index = ReferenceIndex.build(normals, counted, folder=folder, **options)
    assert sum(seen) == len(normals) - 8 * len(there)   # the codebook was there too
    whole = ReferenceIndex.build(normals, **options)
    assert index.paths == whole.paths and (index.histograms == whole.histograms).all()
    assert not (folder/PARTS).exists() and not list(folder.glob('.*.part'))

def test_pairs_are_of_the_same_category_and_never_the_image_itself(root, tmp_path):
    rows = labelled(root/'sample_data', categories=('metal', 'tile'))
    category = {os.path.abspath(row['path']): row['category'] for row in rows if not row['label']}
    for row in pair_references(rows, folder=tmp_path, sample=(4, 500), restarts=1, progress=False):
        assert row['reference'] != os.path.abspath(row['path']) and category[row['reference']] == row['category']

def test_one_line_for_what_does_not_fit(normals, tmp_path):
    options = dict(sample=(4, 500), restarts=1, progress=False)
    ReferenceIndex.build(normals[:4], folder=tmp_path, **options)
    for wrong in (lambda: ReferenceIndex.build(normals[:5], folder=tmp_path, **options), lambda: ReferenceIndex.build(normals[:4], folder=tmp_path, **options | dict(seed=7)),
                  lambda: ReferenceIndex.build([], folder=tmp_path), lambda: ReferenceIndex.load(tmp_path/'nowhere'), lambda: ReferenceIndex.load(tmp_path, lambda images: images)):
        with pytest.raises(ValueError) as error: wrong()
        assert '\n' not in str(error.value) and len(str(error.value)) < 700

def test_a_damaged_index_says_so(normals, tmp_path):
    "an index file from others: names that lead outside or are no pictures, numbers that are none"
    ReferenceIndex.build(normals[:6], folder=tmp_path, sample=(4, 500), restarts=1, progress=False)
    arrays, about = unpack_index(tmp_path/INDEX)
    for change in (dict(names=['../../outside.png'] + about['names'][1:]), dict(names=['/etc/shadow.png'] + about['names'][1:]), dict(names=['notes.txt'] + about['names'][1:])):
        (tmp_path/INDEX).write_bytes(pack_index(arrays, about | change))
        with pytest.raises(ValueError): ReferenceIndex.load(tmp_path)
    (tmp_path/INDEX).write_bytes(pack_index(arrays | dict(histograms=np.full_like(arrays['histograms'], np.nan)), about))
    with pytest.raises(ValueError, match='do not fit each other'): ReferenceIndex.load(tmp_path)

def test_defective_images_are_never_normal_ones(normals, root, tmp_path):
    "a known layout without train/good, and one with a broken line of metadata"
    rows = labelled(root/'sample_data', categories=('metal',))
    (tmp_path/'a'/'metal'/'test'/'crack').mkdir(parents=True); (tmp_path/'b').mkdir(); (tmp_path/'plain').mkdir()
    for place in ('a/metal/test/crack', 'b', 'plain'): shutil.copy(normals[0], tmp_path/place/'0.jpg')
    (tmp_path/'b'/'metadata.jsonl').write_text('{"file_name": "0.jpg", "label": 1}\n{"half')
    for name in ('a', 'b'):
        with pytest.raises(ValueError): pair_references(rows, tmp_path/name, progress=False)
    assert pair_references(rows.select([0]), tmp_path/'plain', sample=(4, 500), restarts=1, progress=False)['reference'] == [str(tmp_path/'plain'/'0.jpg')]
    assert pair_references(rows.select([0]), tmp_path/'plain'/'0.jpg', sample=(4, 500), restarts=1, progress=False)['reference'] == [str(tmp_path/'plain'/'0.jpg')]   # one file

def test_a_folder_a_category_serves_no_other_category(normals, root, tmp_path):
    "brick/ and leather/ with only bricks asked for: leather serves nobody; without any folder of theirs, and from one plain folder, every image serves all"
    for place in ('brick', 'leather', 'plain'): (tmp_path/place).mkdir(); shutil.copy(normals[0], tmp_path/place/'0.jpg')
    def found(folder, categories): return sorted((category, os.path.relpath(path, folder)) for category, path in normals_from(folder, categories))
    (tmp_path/'plain'/'0.jpg').rename(tmp_path/'1.jpg'); (tmp_path/'plain').rmdir()
    assert found(tmp_path, {'brick'}) == [('', '1.jpg'), ('brick', 'brick/0.jpg'), ('leather', 'leather/0.jpg')]
    for categories in (set(), {'metal'}): assert found(tmp_path, categories) == [('', '1.jpg'), ('', 'brick/0.jpg'), ('', 'leather/0.jpg')]
    assert found(tmp_path/'brick', set()) == found(tmp_path/'brick', {'brick'}) == [('', '0.jpg')]

def test_no_reference_says_what_there_was_to_choose_from(root, tmp_path):
    "train holds a broken file and one copy of the only readable picture: it is not said that the category has no normal image, for test/good has some"
    rows = labelled(root/'sample_data', categories=('metal',)).to_list()
    train, good = ([row for row in rows if not row['label'] and row['split'] == split] for split in ('train', 'test'))
    (tmp_path/'broken.jpg').write_bytes(b'no picture')
    pair = pair_references(Dataset.from_list([train[0], train[0] | dict(path=str(tmp_path/'broken.jpg')), good[0]]), sample=(4, 500), restarts=1, progress=False)
    assert pair['reference'] == ['', '', os.path.abspath(train[0]['path'])]
    assert any("1 of 3 images of 'metal' get no reference, because none of the normal images to choose from (2) can be read and shows another picture" in said for said in reference_problems(pair))

def test_features_without_a_name_are_not_stored(normals, tmp_path):
    "two lambdas share a name: the index of one must not be taken for that of the other"
    for nameless in (lambda images: filter_bank(images)[..., :3], partial(filter_bank)):
        with pytest.raises(ValueError, match='no name of their own') as error: ReferenceIndex.build(normals[:4], nameless, folder=tmp_path/'index', progress=False)
        assert '\n' not in str(error.value) and not (tmp_path/'index').exists()
        assert len(ReferenceIndex.build(normals[:4], nameless, sample=(4, 500), restarts=1, progress=False)) == 4   # nothing is stored: any function will do
