//! Guards against examples that no longer do what they say: each is run as its users run it, as a program.
//!
//! The programs are those that `cargo test` has built beside this one (`cargo test --test examples` alone builds none).

#[allow(dead_code, reason = "the example uses the rest of it")]
#[path = "../examples/wordcount/words.rs"]
mod words;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// No example takes a tenth of this.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// An example to be run in an empty directory for temporary files.
struct Example {
    command: Command,
    temporary: TempDir,
}

impl Example {
    fn new(name: &str) -> Example {
        let temporary = tempfile::tempdir().unwrap();
        let mut command = Command::new(program(name));
        command
            .env("TMPDIR", temporary.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Example { command, temporary }
    }

    fn args<A: AsRef<std::ffi::OsStr>>(
        mut self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Example {
        self.command.args(arguments);
        self
    }

    /// Runs it to its end, and checks that it has left no directory of its own.
    fn run(mut self) -> Finished {
        let finished = Finished::new(self.command.spawn().unwrap());
        let left: Vec<_> = fs::read_dir(self.temporary.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        assert!(left.is_empty(), "left behind: {left:?}\n{finished:?}");
        finished
    }
}

#[derive(Debug)]
struct Finished {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Finished {
    /// Waits for the end, for as long as an example may take.
    fn new(child: Child) -> Finished {
        let pid = netmcore::sys::process::Pid::new(child.id().try_into().unwrap()).unwrap();
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || sender.send(child.wait_with_output()));
        let output: Output = match receiver.recv_timeout(TIME_LIMIT) {
            Ok(output) => output.unwrap(),
            Err(_) => {
                netmcore::sys::process::kill(pid, SIGKILL).unwrap();
                panic!("it hangs: {:?}", receiver.recv());
            }
        };
        Finished {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Its output, if it has succeeded without a complaint.
    #[track_caller]
    fn success(self) -> String {
        assert!(self.code == Some(0) && self.stderr.is_empty(), "{self:?}");
        self.stdout
    }

    #[track_caller]
    fn failure(self, code: i32, complaint: &str) {
        assert!(
            self.code == Some(code) && self.stderr.contains(complaint),
            "{self:?}"
        );
    }
}

const SIGKILL: i32 = 9;

const EXAMPLES: [&str; 8] = [
    "chameneos",
    "counters",
    "create_join",
    "matrix",
    "nqueens",
    "pipeline",
    "survivor",
    "wordcount",
];

fn program(name: &str) -> PathBuf {
    let this = std::env::current_exe().unwrap(); // target/PROFILE/deps/examples-HASH
    let path = this
        .parent()
        .and_then(Path::parent)
        .unwrap()
        .join("examples")
        .join(name);
    assert!(
        path.exists(),
        "{} is missing: build it with cargo build --examples",
        path.display()
    );
    path
}

fn recorded(directory: &Path) -> Vec<netmcore::pmanage::KernelObject> {
    netmcore::pmanage::Log::open(directory)
        .unwrap()
        .registered()
        .unwrap()
}

#[test]
fn create_join_ends_with_the_sum() {
    let stdout = Example::new("create_join").run().success();
    assert_eq!(stdout.lines().last(), Some("Final result: 385"), "{stdout}");
    for number in 1..=10 {
        let line = format!("the square of {number} is {}", number * number);
        assert_eq!(
            stdout.lines().filter(|&found| found == line).count(),
            1,
            "{line:?} in\n{stdout}"
        );
    }
}

#[test]
fn create_join_runs_twice_in_one_directory() {
    let directory = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let stdout = Example::new("create_join")
            .args(["--socket-directory".as_ref(), directory.path()])
            .run()
            .success();
        assert!(stdout.ends_with("Final result: 385\n"), "{stdout}");
        assert_eq!(recorded(directory.path()), []);
    }
}

#[test]
fn unknown_options_are_refused() {
    for name in EXAMPLES {
        Example::new(name)
            .args(["--no-such-option"])
            .run()
            .failure(2, "--no-such-option");
        Example::new(name)
            .args(["--socket-directory"])
            .run()
            .failure(2, "--socket-directory");
        let help = Example::new(name).args(["--help"]).run().success();
        assert!(help.starts_with(&format!("Usage: {name} ")), "{help}");
    }
}

#[test]
fn numbers_out_of_range_are_refused() {
    for (name, option, value, range) in [
        ("nqueens", "--max", "15", "1..=14"),
        ("matrix", "--block", "0", "1.."),
        ("counters", "--kill", "9", "..=8"),
        ("wordcount", "--share-bytes", "0", "1.."),
    ] {
        let complaint = format!("{option} is {value}, and must be in {range}; try --help");
        Example::new(name)
            .args([option, value])
            .run()
            .failure(2, &complaint);
    }
}

#[test]
fn directory_that_is_no_directory_is_an_error() {
    for name in EXAMPLES {
        Example::new(name)
            .args(["--socket-directory", "/dev/null/x"])
            .run()
            .failure(1, "/dev/null/x");
    }
}

#[test]
fn survivor_tells_what_became_of_each() {
    let finished = Example::new("survivor").run();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let lines: Vec<&str> = finished.stdout.lines().collect();
    let expected: [(&str, &[&str]); 9] = [
        ("Works", &["returned 5050"]),
        (
            "Panics",
            &["this process was told to panic", "survivor.rs:"],
        ),
        ("Segfaults", &["SIGSEGV"]),
        ("Aborts", &["SIGABRT"]),
        ("Exits", &["3"]),
        ("EatsMemory", &["memory", "limit"]),
        ("Hangs", &["time", "limit"]),
        ("IsKilled", &["SIGKILL"]),
        ("Works", &["returned 5050"]),
    ];
    assert_eq!(lines.len(), expected.len() + 1, "{finished:?}");
    for (line, (fate, words)) in lines.iter().zip(expected) {
        assert!(
            line.starts_with(fate) && line.contains(" Process "),
            "{line:?} is not about {fate}"
        );
        for word in words {
            assert!(
                line.to_lowercase().contains(&word.to_lowercase()),
                "no {word:?} in {line:?}"
            );
        }
    }
    assert_eq!(
        *lines.last().unwrap(),
        "9 processes: 2 returned, 7 failed, the program survived"
    );
}

#[test]
fn nqueens_prints_the_known_counts_with_any_number_of_processes() {
    let known = [1, 0, 0, 1, 2, 1, 6, 12, 46, 92, 341, 1787];
    let found = |max: &str, processes: &str| -> Vec<usize> {
        let stdout = Example::new("nqueens")
            .args(["--max", max, "--processes", processes])
            .run()
            .success();
        let count = |line: &str| line.split_whitespace().nth(2).unwrap().parse().unwrap();
        stdout.lines().map(count).collect()
    };
    assert_eq!(found("12", "2"), known);
    assert_eq!(found("9", "1"), known[..9]);
    assert_eq!(found("9", "20"), known[..9]);
}

#[test]
fn pipeline_finds_what_a_loop_finds() {
    let steps = |start: u64| {
        let next = |&n: &u64| {
            (n != 1).then(|| {
                if n.is_multiple_of(2) {
                    n / 2
                } else {
                    3 * n + 1
                }
            })
        };
        std::iter::successors(Some(start), next).count() - 1
    };
    for (limit, explorers) in [(100_000, "3"), (30_000, "1"), (2, "2")] {
        let stdout = Example::new("pipeline")
            .args(["--limit", &limit.to_string(), "--explorers", explorers])
            .run()
            .success();
        let best = (1..limit).rev().max_by_key(|&start| steps(start)).unwrap();
        let expected = format!("begins with {best}: {} steps", steps(best));
        assert!(
            stdout.trim_end().ends_with(&expected),
            "{expected}:\n{stdout}"
        );
    }
}

#[test]
fn matrix_product_is_the_serial_one() {
    for (size, block) in [("100", "30"), ("1", "5"), ("64", "64")] {
        let stdout = Example::new("matrix")
            .args(["--size", size, "--block", block, "--processes", "3"])
            .run()
            .success();
        assert!(
            stdout.ends_with("the serial product is the same\n"),
            "{stdout}"
        );
    }
}

#[test]
fn counters_add_up_whoever_is_killed() {
    for kill in ["0", "5", "8"] {
        let stdout = Example::new("counters")
            .args(["--steps", "3000", "--kill", kill])
            .run()
            .success();
        assert!(stdout.ends_with("keys: it adds up\n"), "{stdout}");
        let killed = stdout.matches("it was killed").count();
        assert!(killed <= kill.parse().unwrap(), "{stdout}");
        assert!(kill == "0" || killed > 0, "{stdout}");
    }
}

#[test]
fn chameneos_meet_in_pairs() {
    let stdout = Example::new("chameneos")
        .args(["--meetings", "500", "--creatures", "5"])
        .run()
        .success();
    assert!(
        stdout.ends_with("1000 in all, two for each of 500 meetings\n"),
        "{stdout}"
    );
    let number = |line: &str| line.split(' ').nth(2).unwrap().parse::<u64>().unwrap();
    let meetings: Vec<u64> = stdout.lines().take(5).map(number).collect();
    assert_eq!(meetings.iter().sum::<u64>(), 1000);
}

/// What wordcount prints of the files, as numbers: the table, in its order, and the total.
fn wordcount<A: AsRef<std::ffi::OsStr>>(
    arguments: impl IntoIterator<Item = A>,
) -> (Vec<(String, u64)>, u64) {
    let stdout = Example::new("wordcount")
        .args(["--top", "0"])
        .args(arguments)
        .run()
        .success();
    let (table, summary) = stdout
        .split_once("\n\n")
        .or_else(|| stdout.split_once('\n'))
        .unwrap();
    let table = table.lines().map(|line| {
        let (count, word) = line
            .trim_start()
            .split_once(' ')
            .unwrap_or_else(|| panic!("{line:?}"));
        (word.to_owned(), count.parse().unwrap())
    });
    let total = summary.split(' ').next().unwrap().parse().unwrap();
    (table.collect(), total)
}

/// The oracle: a few obvious lines.
fn counted_plainly(text: &[u8]) -> (Vec<(String, u64)>, u64) {
    let mut counts = BTreeMap::new();
    for word in text
        .split(|byte| !byte.is_ascii_alphabetic())
        .filter(|word| !word.is_empty())
    {
        *counts
            .entry(String::from_utf8(word.to_ascii_lowercase()).unwrap())
            .or_default() += 1;
    }
    let total = counts.values().sum();
    let mut table: Vec<(String, u64)> = counts.into_iter().collect();
    table.sort_by_key(|(_, count)| std::cmp::Reverse(*count)); // stable: the words stay in their order
    (table, total)
}

fn jargon() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/wordcount/text/jargon.txt")
}

fn file_of(text: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text).unwrap();
    file
}

#[test]
fn wordcount_of_the_shipped_text_is_right() {
    let text = fs::read(jargon()).unwrap();
    assert!(text.len() >= 1_000_000);
    assert_eq!(wordcount([""; 0]), counted_plainly(&text));
    let stdout = Example::new("wordcount").args(["--check"]).run().success();
    assert!(
        stdout.contains("this process alone counts the same"),
        "{stdout}"
    );
    assert_eq!(
        stdout.lines().position(str::is_empty),
        Some(10),
        "the top ten:\n{stdout}"
    );
}

#[test]
fn wordcount_counts_as_tr_sort_and_uniq_do() {
    let pipeline = r"LC_ALL=C; export LC_ALL
        tr -cs A-Za-z '\n' < FILE | tr A-Z a-z | grep . | sort | uniq -c | sort -k1,1nr -k2";
    let pipeline = pipeline.replace("FILE", jargon().to_str().unwrap());
    let tools = Command::new("sh")
        .arg("-c")
        .arg("command -v tr sort uniq grep")
        .output();
    if !tools.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: tr, grep, sort and uniq are not all here");
        return;
    }
    let expected = Command::new("sh").arg("-c").arg(pipeline).output().unwrap();
    assert!(expected.status.success());
    let stdout = Example::new("wordcount")
        .args(["--top", "0"])
        .run()
        .success();
    let (table, _) = stdout.split_once("\n\n").unwrap();
    assert_eq!(
        table,
        String::from_utf8(expected.stdout)
            .unwrap()
            .trim_end_matches('\n')
    );
}

#[test]
fn wordcount_does_not_depend_on_the_shares() {
    let long_word = "supercalifragilistic".repeat(40);
    let mut text =
        format!("a bb ccc {long_word} A Bb; don't na\u{ef}ve {long_word}end").into_bytes();
    text.extend([0xff, b'x', 0, b'X', 0x80]);
    let file = file_of(&text);
    let expected = counted_plainly(&text);
    for (processes, share_bytes) in [("1", "1"), ("3", "7"), ("2", "100"), ("5", "1000000")] {
        let options = ["--processes", processes, "--share-bytes", share_bytes].map(AsRef::as_ref);
        let counted = wordcount(options.into_iter().chain([file.path().as_os_str()]));
        assert_eq!(
            counted, expected,
            "{processes} processes, shares of {share_bytes} bytes"
        );
    }
}

#[test]
fn wordcount_takes_several_files_and_empty_ones() {
    let (one, empty, two) = (file_of(b"one two"), file_of(b""), file_of(b"two three"));
    // The end of a file is the end of a word.
    let expected =
        [("two", 2), ("one", 1), ("three", 1)].map(|(word, count)| (word.to_owned(), count));
    assert_eq!(
        wordcount([one.path(), empty.path(), two.path()]),
        (expected.to_vec(), 4)
    );
    assert_eq!(wordcount([empty.path()]), (vec![], 0));
}

#[test]
fn wordcount_names_the_file_it_cannot_count() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    Example::new("wordcount")
        .args([&missing])
        .run()
        .failure(1, missing.to_str().unwrap());
    Example::new("wordcount")
        .args([directory.path()])
        .run()
        .failure(1, "not a regular file");
}

#[test]
fn wordcount_has_a_bar_on_a_terminal_only() {
    Example::new("wordcount").run().success(); // standard error is a pipe, and empty
    let script = Command::new("script").arg("--version").output();
    if !script.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: script(1), which has a terminal to give, is not here");
        return;
    }
    let mut command = Command::new("script");
    command
        .args(["--quiet", "--return", "--command"])
        .arg(program("wordcount"))
        .arg("/dev/null");
    command
        .env("TERM", "xterm")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let finished = Finished::new(command.spawn().unwrap());
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert!(finished.stdout.contains("iB/s"), "{finished:?}");
}

/// A file that takes no space, but for ever to read.
fn endless() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 40).unwrap();
    file
}

/// Waits until a program that has just been started has its record in `directory`.
fn wait_for_work(program: &mut Child, directory: &Path) {
    let deadline = Instant::now() + TIME_LIMIT;
    while !directory.join("netplex.pmanage").exists() {
        let runs = program.try_wait().unwrap().is_none();
        assert!(runs && Instant::now() < deadline, "it does not get to work");
        // sleep: between two looks; the deadline above ends it.
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn wordcount_killed_in_the_middle_starts_again() {
    let directory = tempfile::tempdir().unwrap();
    let endless = endless();
    let mut killed = Command::new(program("wordcount"))
        .arg("--socket-directory")
        .args([directory.path(), endless.path()])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    wait_for_work(&mut killed, directory.path());
    killed.kill().unwrap();
    assert_eq!(killed.wait().unwrap().signal(), Some(SIGKILL));
    // No orphan holds the directory, and what the dead run left is cleaned.
    let text = file_of(b"again and again");
    let arguments = ["--socket-directory".as_ref(), directory.path(), text.path()];
    assert_eq!(
        wordcount(arguments),
        (vec![("again".into(), 2), ("and".into(), 1)], 3)
    );
    assert_eq!(recorded(directory.path()), []);
}

#[test]
fn wordcount_interrupted_leaves_nothing() {
    let endless = endless();
    let mut example = Example::new("wordcount").args([endless.path()]);
    let mut program = example.command.spawn().unwrap();
    let deadline = Instant::now() + TIME_LIMIT;
    let fresh = loop {
        match fs::read_dir(example.temporary.path()).unwrap().next() {
            Some(entry) => break entry.unwrap().path(),
            None => assert!(Instant::now() < deadline, "it makes no directory"),
        }
    };
    wait_for_work(&mut program, &fresh);
    let pid = netmcore::sys::process::Pid::new(program.id().try_into().unwrap()).unwrap();
    // Not SIGINT: it is ignored where a shell has started the tests in the background.
    netmcore::sys::process::kill(pid, netmcore::sys::signal::SIGTERM).unwrap();
    Finished::new(program).failure(1, "signal 15");
    assert!(!fresh.exists());
}

#[test]
fn shares_cover_the_file_and_cut_no_word() {
    let text = fs::read(jargon()).unwrap();
    let file = File::open(jargon()).unwrap();
    for share_bytes in [1_000, 65_536, 1_000_003, 10_000_000] {
        let shares = words::cut(7, &file, text.len() as u64, share_bytes).unwrap();
        let mut at = 0;
        for share in &shares {
            assert_eq!((share.file, share.range.start), (7, at));
            assert!(share.len_bytes() > 0);
            at = share.range.end;
            let letter = |index: u64| {
                text.get(index as usize)
                    .is_some_and(u8::is_ascii_alphabetic)
            };
            assert!(
                !(letter(at - 1) && letter(at)),
                "a word stands across byte {at}"
            );
        }
        assert_eq!(at, text.len() as u64);
    }
}
