"What has to hold for `readl_cold_start` as a user runs it: killed, damaged, spread over two processes or misused, it ends with the same adapter or says why not in one sentence."
import json, math, shutil, subprocess, sys
from pathlib import Path
import pytest
from helpers import adapter, contents, copy_samples, flip_a_bit, half_a_checkpoint, kill_when, small_disk, steps
from readl_nb.anomaly_commands import readl_cold_start
from readl_nb.explanations import explain
from readl_nb.training import checkpoints, last_whole, read_metrics

CODE = 'import sys; from readl_nb.anomaly_commands import readl_cold_start; sys.exit(readl_cold_start())'
COMMAND = [sys.executable, '-c', CODE]
SETTINGS = 'batch_size: 2\nmicro_batch: 1\nmax_steps: 4\nsave_steps: 1\nlearning_rate: 1e-3\nwarmup: 0.25\n'

@pytest.fixture(scope='module')
def made(tmp_path_factory, root):
    "A folder with images, texts, settings, and a run of four steps that nobody disturbed."
    folder = tmp_path_factory.mktemp('cold start')
    copy_samples(root, folder/'data', good=3, bad=2, masks=True)
    explain(folder/'data', folder/'texts', progress=False)
    (folder/'settings.yaml').write_text(SETTINGS)
    done = subprocess.run(command(folder, folder/'run'), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder/'said.txt').write_text(done.stderr)
    return folder

def command(made, out, *more, start=COMMAND, data='texts'):
    return [*start, '--data', str(made/data), '--config', str(made/'settings.yaml'), '--out', str(out), '--device', 'cpu', *map(str, more)]

def here(capsys, made, out, *more, **options):
    "Exit code and standard error of the command, in this process."
    capsys.readouterr(); code = readl_cold_start(command(made, out, *more, start=[], **options))
    return code, capsys.readouterr().err

def test_a_whole_run_leaves_what_it_promises(made):
    out, told = made/'run', (made/'said.txt').read_text()
    lines = [json.loads(line) for line in (out/'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == [1, 2, 3, 4] and all(math.isfinite(line['loss']) and 0 <= line['token_accuracy'] <= 1 for line in lines)
    assert sorted(p.name for p in out.iterdir() if p.name != 'runs') == ['adapter', 'checkpoint-3', 'checkpoint-4', 'metrics.jsonl', 'run.json']   # runs is TensorBoard's
    assert sorted(p.name for p in (out/'adapter').iterdir()) == ['adapter_config.json', 'adapter_model.safetensors']
    assert 'GiB' in told and 'a step, 4 steps' in told and '10 texts to learn from' in told and told.count('left: loss') == 4

def test_the_adapter_loads_and_changes_the_answers(made):
    from readl_nb.cold_start import ColdStartConfig, token_losses
    from readl_nb.explanations import read_explanations
    from readl_nb.models import load_vlm
    row = [read_explanations(made/'texts')[0]]
    before, after = (float(token_losses(load_vlm('readl-tiny-boxes', each, device='cpu'), row, ColdStartConfig())[0].mean()) for each in (None, str(made/'run'/'adapter')))
    assert after < before

SLOW = f"""
import time, transformers
whole = transformers.Trainer.training_step
def slow(self, *a, **k): time.sleep(.5); return whole(self, *a, **k)
transformers.Trainer.training_step = slow
{CODE}"""

@pytest.mark.parametrize('code, moment, sentence', [
    (SLOW, lambda out: (out/'run.json').exists(), None), (SLOW, lambda out: len(read_metrics(out)) >= 2, 'goes on from checkpoint-'),
    (half_a_checkpoint(2, CODE), lambda out: any((out/'checkpoint-2').glob('optimizer.pt')), 'checkpoint-2 is not used: it is unfinished; it is removed and the run goes on from checkpoint-1')], ids=['before a checkpoint', 'after line 2', 'within a checkpoint'])
def test_killed_it_goes_on_as_if_nothing_had_been(made, tmp_path, capsys, code, moment, sentence):
    out = tmp_path/'run'
    kill_when(lambda: moment(out), command(made, out, start=[sys.executable, '-c', code]))
    assert len(read_metrics(out)) < 4
    assert sentence or not checkpoints(out)
    status, error = here(capsys, made, out)
    assert status == 0 and (sentence in error if sentence else 'checkpoint' not in error), error
    assert steps(out) == steps(made/'run') and adapter(out) == adapter(made/'run')

def test_damaged_newest_checkpoint_the_one_before_is_used(made, tmp_path, capsys):
    out = Path(shutil.copytree(made/'run', tmp_path/'run')); flip_a_bit(out/'checkpoint-4'/'optimizer.pt')
    code, error = here(capsys, made, out)
    assert code == 0 and 'checkpoint-4 is not used: optimizer.pt is damaged' in error and 'goes on from checkpoint-3' in error, error
    assert steps(out) == steps(made/'run') and adapter(out) == adapter(made/'run')

def test_full_disk_keeps_the_checkpoint_before(made, tmp_path):
    out = Path(shutil.copytree(made/'run', tmp_path/'run')); shutil.rmtree(out/'checkpoint-4'); shutil.rmtree(out/'adapter'); before = contents(out/'checkpoint-3')
    done = subprocess.run(command(made, out, start=[sys.executable, '-c', small_disk(CODE)]), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr[-3000:]
    assert 'checkpoint-4 could not be saved' in done.stderr and 'checkpoint-3 is kept' in done.stderr
    assert contents(out/'checkpoint-3') == before and last_whole(out) == (out/'checkpoint-3', [])

def test_finished_run_has_nothing_to_do(made, tmp_path, capsys):
    out = Path(shutil.copytree(made/'run', tmp_path/'run')); before = contents(out)
    code, error = here(capsys, made, out)
    assert code == 0 and 'nothing to do' in error and contents(out) == before

def test_unreadable_reference_another_pair_stands_in(made, tmp_path, capsys):
    shutil.copytree(made/'data', tmp_path/'data'); shutil.copy(made/'settings.yaml', tmp_path)
    explain(tmp_path/'data', tmp_path/'texts', progress=False)
    first = json.loads((tmp_path/'texts'/'explanations.jsonl').read_text().splitlines()[0]); bad = tmp_path/'data'/first['reference']
    assert bad.is_file(); bad.write_bytes(bad.read_bytes()[:999])
    code, error = here(capsys, tmp_path, tmp_path/'run', '--max-steps', 8)
    assert code == 0 and 'could not be read and another of the same label stood in' in error and bad.name in error, error
    assert any(line['unreadable'] for line in read_metrics(tmp_path/'run'))

def test_two_processes_learn_what_one_learns(made, tmp_path):
    from readl_nb.scaling import launch_file
    (tmp_path/'start.py').write_text(CODE)
    accelerate = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', launch_file('cpu'), str(tmp_path/'start.py')]
    done = subprocess.run(command(made, tmp_path/'run', start=accelerate), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(read_metrics(made/'run'), read_metrics(tmp_path/'run'), strict=True):
        assert one['loss'] == pytest.approx(two['loss'], abs=1e-3) and one['grad_norm'] == pytest.approx(two['grad_norm'], rel=1e-3) and one['learning_rate'] == two['learning_rate']

def rewrite(folder, change):
    "The texts, each changed by a function (number, row)."
    file = folder/'texts'/'explanations.jsonl'
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text(''.join(json.dumps(change(n, row)) + '\n' for n, row in enumerate(rows)))

def one_class(folder): rewrite(folder, lambda n, row: row | dict(label=0, text='<think>All is even. There is no defect.</think>\n<answer>No</answer>'))
def contradicting(folder): rewrite(folder, lambda n, row: row | dict(label=1 - row['label']))
def other_size(folder): rewrite(folder, lambda n, row: row | dict(image_size=224))
def outside(folder): rewrite(folder, lambda n, row: row | dict(path='../../../etc/passwd') if n == 1 else row)
def damaged(folder): (folder/'texts'/'explanations.jsonl').write_text('{"a": 1}\n')
def no_texts(folder): shutil.rmtree(folder/'texts'); (folder/'texts').mkdir()
def foreign(folder): (folder/'run').mkdir(); (folder/'run'/'notes.txt').write_text('mine')
def a_file(folder): (folder/'run').write_text('mine')

@pytest.mark.parametrize('change, more, sentence', [
    (one_class, (), 'both classes'), (contradicting, (), 'its answer contradicts its label'), (other_size, (), 'set image_size to 224'), (outside, (), 'explanations.jsonl, line 2'), (damaged, (), 'line 1'), (no_texts, (), 'settings.json'),
    (foreign, (), "holds 'notes.txt' and no run"), (a_file, (), 'this is a file'), ('learning_rte: 1', (), "no setting 'learning_rte'; did you mean 'learning_rate'"), ('epochs: many', (), 'use a number'), ('max_tokens: 100', (), 'longer than 100 tokens'),
    ('micro_batch: 3\nbatch_size: 4', (), 'do not divide'), ('schedule: step', (), "use 'linear', 'cosine' or 'constant'"), ('', ('--device', 'cuda:77'), 'is not there'), ('', ('--model', 'no/such/model'), 'no/such/model'), ('', ('--epochs', 0, '--max-steps', 3), 'use more than 0')])
def test_bad_input_is_one_sentence_and_nothing_is_overwritten(made, tmp_path, capsys, change, more, sentence):
    shutil.copytree(made/'texts', tmp_path/'texts'); shutil.copy(made/'settings.yaml', tmp_path)
    if callable(change): change(tmp_path)
    else: (tmp_path/'settings.yaml').write_text(change + '\n')
    before = contents(tmp_path)
    code, error = here(capsys, tmp_path, tmp_path/'run', *more)
    assert code == 1 and sentence in error and error.count('\n') == 1, error
    assert contents(tmp_path) == before

def test_folder_with_another_run(made, tmp_path, capsys):
    out = Path(shutil.copytree(made/'run', tmp_path/'run')); before = contents(out)
    for more, first in ((('--seed', 5), 'seed is 0 there and 5 here'), (('--max-steps', 5), 'steps is 4 there and 5 here'), (('--no-reference',), 'reference is true there and false here')):
        code, error = here(capsys, made, out, *more)
        assert code == 1 and 'holds another run' in error and first in error and error.count('\n') == 1, error
    assert contents(out) == before

def test_loss_that_is_not_a_number_stops_it(made, tmp_path, capsys, monkeypatch):
    import readl_nb.cold_start as module
    build = module.build_cold_start
    def broken(*a, **k):
        trainer = build(*a, **k); right = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: right(*a, **k) * (math.nan if trainer.state.global_step == 2 else 1.)
        return trainer
    monkeypatch.setattr(module, 'build_cold_start', broken)
    code, error = here(capsys, made, tmp_path/'run')
    assert code == 1 and 'is nan at step 3' in error and 'Traceback' not in error, error
    assert last_whole(tmp_path/'run')[0].name == 'checkpoint-2'

def test_interrupted_it_says_how_to_go_on(made, tmp_path, capsys, monkeypatch):
    import readl_nb.cold_start as module
    def interrupted(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(module, 'go', interrupted)
    code, error = here(capsys, made, tmp_path/'run')
    assert code == 130 and 'the same command goes on from the last checkpoint' in error

def test_wrong_usage_ends_with_2(capsys):
    for wrong in ([], ['--data', 'd'], ['--data', 'd', '--out', 'o', '--max-steps', '0'], ['--data', 'd', '--out', 'o', '--epochs', 'nan']):
        with pytest.raises(SystemExit) as stop: readl_cold_start(wrong)
        assert stop.value.code == 2 and 'usage: readl_cold_start' in capsys.readouterr().err
