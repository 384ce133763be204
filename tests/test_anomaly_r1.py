"What has to hold for the reinforcement learning of Anomaly-R1: killed at any moment it goes on as the same run, groups are changed and counted, the switches switch."
import json, shutil, subprocess, sys
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, load_from_disk
from helpers import adapter, half_a_checkpoint, kill_when, steps
from readl_nb.anomaly_r1 import AnomalyR1Config, Contrast, anomaly_data, train_anomaly_r1
from readl_nb.boxes import as_dicts, mask_boxes
from readl_nb.explanations import from_masks
from readl_nb.samples import CATEGORIES, DEFECTS, generate_sample
from readl_nb.training import checkpoints, read_metrics

SETTINGS = dict(prompts_per_step=2, mini_batch=1, generations=2, micro_batch=2, max_new_tokens=136, temperature=1.3, learning_rate=1e-3, max_steps=6, save_steps=2, warmup=0., lora_rank=4, opposite='masks')
CODE = '''
import json, sys
from datasets import load_from_disk
from readl_nb.anomaly_r1 import AnomalyR1Config, Contrast, anomaly_data, train_anomaly_r1
texts, out, settings = sys.argv[1:]
train_anomaly_r1(load_from_disk(texts), out, AnomalyR1Config(**json.loads(settings)), model='readl-tiny', device='cpu')
'''

def explained(folder):
    "Eight explanations of drawn pictures, half of them with a defect, each with a normal picture of its kind."
    rows = []
    for n in range(8):
        sample, normal = generate_sample(n, CATEGORIES[n // 2], DEFECTS[n // 2] if n % 2 else 'good', severity=.7), generate_sample(900 + n, CATEGORIES[n // 2], 'good')
        row = dict(path=str(folder/f'{n}.png'), reference=str(folder/f'{n}_normal.png'), label=sample.label, category=sample.category, defect=sample.defect, split='train', image_size=420,
                   boxes=as_dicts(mask_boxes(np.array(sample.mask), sample.defect)) if sample.label else [])
        sample.image.save(row['path']); normal.image.save(row['reference']); rows.append(row | dict(text=from_masks(row)))
    return Dataset.from_list(sorted(rows, key=lambda row: -row['label']))   # the first row tells what a box is

def command(made, out, code=CODE, **changes): return [sys.executable, '-c', code, str(made/'texts'), str(out), json.dumps(SETTINGS | changes)]

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with explanations and a run of three rollouts that nobody disturbed."
    folder = tmp_path_factory.mktemp('anomaly_r1')
    explained(folder).save_to_disk(folder/'texts')
    done = subprocess.run(command(folder, folder/'run'), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder/'said.txt').write_text(done.stderr)
    return folder

def completions(out): return {path.name: path.read_bytes() for path in (out/'completions').iterdir()}

def test_a_whole_run_leaves_what_it_promises(made):
    out, told, lines = made/'run', (made/'said.txt').read_text(), steps(made/'run')
    assert [line['step'] for line in lines] == [2, 4, 6] and sorted(completions(out)) == [f'completions_{n:05}.parquet' for n in (2, 4, 6)]
    assert {'reward', 'reward/result', 'reward/boxes', 'groups/sampled_equal', 'groups/sampled_reward', 'zero_variance_groups', 'kl', 'loss', 'malformed'} <= lines[0].keys()
    assert '-> ' in told and told.count('step ') == 3 and sorted(p.name for p in (out/'adapter').iterdir()) == ['adapter_config.json', 'adapter_model.safetensors']
    table = pd.concat([pd.read_parquet(out/'completions'/name) for name in completions(out)])
    assert (table['origin'] == 'verified').sum() == 6 and (table['result'][table['origin'] == 'verified'] == 1).all() and set(table['origin']) <= {'sampled', 'verified', 'opposite'}
    assert all(line['groups/verified'] == 1 for line in lines)

@pytest.mark.parametrize('code, moment', [(CODE, lambda out: (out/'run.json').exists()), (CODE, lambda out: len(read_metrics(out)) >= 1), (half_a_checkpoint(4, CODE), lambda out: any((out/'checkpoint-4').glob('optimizer.pt')))],
                         ids=['before a checkpoint', 'within a rollout', 'within a checkpoint'])
def test_killed_it_goes_on_as_if_nothing_had_been(made, tmp_path, code, moment):
    out = tmp_path/'run'
    kill_when(lambda: moment(out), command(made, out, code, max_steps=600), limit=600)
    assert len(read_metrics(out)) < 3
    train_anomaly_r1(load_from_disk(made/'texts'), out, AnomalyR1Config(**SETTINGS), model='readl-tiny', device='cpu', progress=False)
    assert steps(out) == steps(made/'run') and completions(out) == completions(made/'run')
    assert adapter(out) == adapter(made/'run')
    assert [path.name for path in checkpoints(out)] == ['checkpoint-4', 'checkpoint-6']

def test_without_contrastive_sampling_groups_stay_as_they_were(made, tmp_path):
    train_anomaly_r1(load_from_disk(made/'texts'), tmp_path/'run', AnomalyR1Config(**SETTINGS | dict(contrastive=False, max_steps=2)), model='readl-tiny', device='cpu', progress=False)
    line, = steps(tmp_path/'run')
    assert line['groups/sampled_equal'] == line['zero_variance_groups'] and line['groups/verified'] == line['groups/rewritten'] == 0 and abs(line['groups/sampled_reward'] - line['reward']) < 1e-6

def files(folder): return {path.name: path.read_bytes() for path in folder.iterdir()}

def test_the_adapter_is_that_of_the_last_checkpoint(made, tmp_path, capsys):
    def train(steps, **more): return train_anomaly_r1(load_from_disk(made/'texts'), tmp_path/'run', AnomalyR1Config(**SETTINGS | dict(max_steps=steps)), adapter=made/'run', model='readl-tiny', device='cpu', progress=False, **more)
    train(2, bf16=True)   # from the folder of a run, with products in bfloat16 as on a GPU
    shutil.copytree(tmp_path/'run'/'adapter', tmp_path/'older')
    whole = files(train(4, bf16=True)); capsys.readouterr()
    assert whole != files(tmp_path/'older') and all(line['kl'] is not None for line in steps(tmp_path/'run'))
    def killed(): shutil.rmtree(tmp_path/'run'/'adapter'); shutil.copytree(tmp_path/'older', tmp_path/'run'/'adapter')   # after checkpoint-4, before the adapter
    for harm in (killed, *[(tmp_path/'run'/'adapter'/name).unlink for name in whole]):
        harm(); assert files(train(4, bf16=True)) == whole and 'its adapter is made again' in capsys.readouterr().err
    assert files(train(4, bf16=True)) == whole and 'nothing to do' in capsys.readouterr().err

def test_a_run_does_not_go_on_with_others(made):
    texts, config = load_from_disk(made/'texts'), AnomalyR1Config(**SETTINGS)
    others = texts.map(lambda row, n: dict(reference=texts[n - 1]['reference']), with_indices=True)
    def go_on(texts, **more): return train_anomaly_r1(texts, made/'run', config, model='readl-tiny', device='cpu', progress=False, **more)
    with pytest.raises(ValueError, match='holds another run: the references_sha256 of the data differs'): go_on(others)
    with pytest.raises(ValueError, match='opposites is null there and ".*largest" here'): go_on(texts, opposite=Cut())
    assert go_on(texts) == made/'run'/'adapter'

class Cut:
    "A stronger model whose answers end at the limit of tokens."
    name = 'largest'
    def answers(self, images, max_new_tokens, temperature, prompts): return [type('Answer', (), dict(text='<answer>No</answer>', truncated=n == 0)) for n, _ in enumerate(prompts)]

def test_texts_that_were_cut_off_are_not_used(made):
    from readl_nb.models import load_vlm
    config = AnomalyR1Config(**SETTINGS)
    contrast, data = Contrast(load_vlm(device='cpu'), config, Cut()), anomaly_data(load_from_disk(made/'texts'), config)
    assert [ids is None for ids in contrast.against(None, [data[0], data[1], data[2]])] == [True, False, False]

def test_the_only_wrong_response_is_kept(made):
    from readl_nb.models import load_vlm
    contrast = Contrast(load_vlm(device='cpu'), AnomalyR1Config(**SETTINGS))
    for rewards, places in (([1, .8, 1, 1], {0, 2, 3}), ([0, 1], {1}), ([0, 0], {0, 1}), ([1, 1], {0, 1})): assert {contrast.place(rewards) for _ in range(80)} == places

@pytest.mark.parametrize('warmup', [float('nan'), float('inf'), -.1, 1.5, '0.1', None])
def test_warm_up_that_cannot_be(warmup):
    with pytest.raises(ValueError, match='AnomalyR1Config.warmup is .*; use 0 to 1'): AnomalyR1Config(warmup=warmup)

def test_nothing_left_names_the_reason(made):
    texts, config = load_from_disk(made/'texts'), AnomalyR1Config(**SETTINGS)
    for change, words in ((dict(image_size=448), r'8 with boxes for squares of 448 pixels.*set image_size to 448'), (dict(reference=''), '8 with no reference image')):
        with pytest.raises(ValueError, match=words): anomaly_data(texts.map(lambda row: change), config)
