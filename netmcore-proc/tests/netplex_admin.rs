//! Guards against a directory that the ancestor's `netplex-admin` cannot clean after our program was killed, and against
//! harm that it does to a program of ours that is alive. The tool is in Debian's package `libocamlnet-ocaml-bin`.

#[path = "objects/mod.rs"]
mod objects;
#[macro_use]
#[path = "program/mod.rs"]
mod program;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use netmcore_pmanage::{ControllerSocket, KernelObject};
use netmcore_proc::{
    Master, create_file, create_shm_sc, manage_file, manage_sem, manage_shm, record, spawn,
};
use netmcore_sys::{ObjectName, sem, shm};
use objects::{assert_clean, recorded, run_first, sem_path, shm_path, wait_until};

tests_and_programs! {
    tests:
        ancestors_tool_cleans_up_after_a_killed_program,
        ancestors_tool_is_refused_by_a_live_master,
        foreign_bytes_do_a_live_master_no_harm;
    programs: leave_everything, live_on
}

/// What a record must quote, in all ways that there are.
const AWKWARD: [&[u8]; 7] = [
    b"two words",
    b"\"quoted\" and 'quoted'",
    b"back\\slash \\n \\",
    b"line\nbreaks\r\n",
    b"tab\t and \x01\x08\x1b\x7f",
    "gr\u{fc}\u{df}e \u{4f60}\u{597d}".as_bytes(),
    b"raw \xff\xfe\x80",
];

fn admin(dir: &Path, option: &str) -> Output {
    let output = Command::new("netplex-admin")
        .arg("-sockdir")
        .arg(dir)
        .arg(option)
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) => output,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            netmcore_forktest::skip("netplex-admin is not installed")
        }
        Err(error) => panic!("netplex-admin: {error}"),
    }
}

fn directory() -> (tempfile::TempDir, PathBuf) {
    let owner = tempfile::tempdir().unwrap();
    let dir = owner.path().join("sockets");
    (owner, dir)
}

/// Manages objects of all kinds with awkward names, says so, and waits to be killed.
fn leave_everything(arguments: &[String]) {
    let dir = PathBuf::from(&arguments[0]);
    let mut master = Master::builder(&dir);
    let in_first = dir.clone();
    let first = master.def_process(move |()| {
        let random = netmcore_sys::process::random_u64();
        for awkward in AWKWARD {
            let path = in_first.join(OsStr::from_bytes(awkward));
            manage_file(&path).unwrap().keep();
            drop(File::create_new(path).unwrap());
            let name = [format!("/nmc {random:x} ").as_bytes(), awkward].concat();
            let name = ObjectName::new(name).unwrap();
            manage_shm(&name).unwrap().keep();
            drop(shm::create(&name, 0o600).unwrap());
            manage_sem(&name).unwrap().keep();
            drop(sem::NamedSem::create(&name, 1, 0o600).unwrap());
        }
        create_file(in_first.join("made-")).unwrap().keep();
        let with_container = create_shm_sc("/nmc \"made\" ", 4096).unwrap();
        let container = with_container.container().unwrap();
        let log = record().unwrap();
        drop(container.create_semaphore(0, 1, 0o600, &log).unwrap());
        drop(container.create_semaphore(1, 1, 0o600, &log).unwrap());
        with_container.keep();
        let mut output = io::stdout();
        output.write_all(b"ready\n").unwrap();
        output.flush().unwrap();
        loop {
            std::thread::park();
        }
    });
    master.run::<(), ()>(&first, &()).unwrap();
}

fn exists(object: &KernelObject) -> bool {
    let path = match object {
        KernelObject::File(path) => path.clone(),
        KernelObject::PosixShm(name) => shm_path(name),
        KernelObject::PosixSem(name) => sem_path(name),
        KernelObject::SemContainer(_) => return false,
    };
    fs::symlink_metadata(path).is_ok()
}

fn ancestors_tool_cleans_up_after_a_killed_program() {
    let (_owner, dir) = directory();
    // Skips if there is no tool.
    admin(&dir, "-help");
    let mut program = program::start("leave_everything", &[&dir]);
    program.line_after("ready");
    program.signal_group(9);
    program.dies_of(9);
    assert_eq!(program.line(), None, "its output is closed by all");

    let left = recorded(&dir);
    let is_container = |object: &&KernelObject| matches!(object, KernelObject::SemContainer(_));
    assert_eq!(left.iter().filter(is_container).count(), 1);
    assert_eq!(left.len(), 3 * AWKWARD.len() + 1 + 4);
    assert!(
        left.iter()
            .all(|object| is_container(&object) || exists(object))
    );

    let output = admin(&dir, "-unlink");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    for object in &left {
        assert!(!exists(object), "{object} is left; the tool said: {said}");
    }
    assert_eq!(recorded(&dir), BTreeSet::new());

    // And we go on in what it left.
    run_first(&dir, || ());
}

/// Waits for a file to appear, then shows that all works; the name of what it holds goes to its output.
fn live_on(arguments: &[String]) {
    let dir = PathBuf::from(&arguments[0]);
    let mut master = Master::builder(&dir);
    let in_first = dir.clone();
    let first = master.def_process(move |()| {
        let held = create_file(in_first.join("made-")).unwrap();
        let mut output = io::stdout();
        output.write_all(b"ready\n").unwrap();
        output.flush().unwrap();
        wait_until("the test lets it go on", || in_first.join("go").exists());
        fs::remove_file(in_first.join("go")).unwrap();
        assert!(held.path().unwrap().exists());
        let second = create_file(in_first.join("made-")).unwrap();
        let back = spawn(|second| second, &second).unwrap().join().unwrap();
        assert_eq!(back.path(), second.path());
    });
    master.run(&first, &()).unwrap();
}

fn ancestors_tool_is_refused_by_a_live_master() {
    let (_owner, dir) = directory();
    admin(&dir, "-help");
    let mut program = program::start("live_on", &[&dir]);
    program.line_after("ready");
    for option in [
        "-list",
        "-containers",
        "-shutdown",
        "-restart-all",
        "-reopen-logfiles",
    ] {
        let output = admin(&dir, option);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{option} was obeyed: {said}");
        assert!(!said.is_empty(), "{option} is refused without a word");
        eprintln!("{option}: {said}");
    }
    assert_eq!(recorded(&dir).len(), 1);
    File::create(dir.join("go")).unwrap();
    program.succeeds();
    assert_clean(&dir);
}

fn foreign_bytes_do_a_live_master_no_harm() {
    let (_owner, dir) = directory();
    let mut program = program::start("live_on", &[&dir]);
    program.line_after("ready");
    let call: Vec<u8> = [
        0x8000_0028,
        0x1234_5678,
        0,
        2,
        0x2000_0003,
        2,
        1,
        0,
        0,
        0,
        0,
    ]
    .into_iter()
    .flat_map(u32::to_be_bytes)
    .collect();
    let mut reply = Vec::new();
    let send = |bytes: &[u8], reply: &mut Vec<u8>| {
        let mut connection = UnixStream::connect(ControllerSocket::path(&dir)).unwrap();
        // Refused in the middle, the rest cannot be written.
        let _ = connection.write_all(bytes);
        let _ = connection.shutdown(std::net::Shutdown::Write);
        reply.clear();
        let _ = connection.read_to_end(reply);
    };
    // A call of the ancestor's tools: an answer to that call, and the end of the connection.
    send(&call, &mut reply);
    assert_eq!(reply[4..12], [0x12, 0x34, 0x56, 0x78, 0, 0, 0, 1]);
    assert_eq!(reply.len(), 28);
    // What means nothing: the end of the connection.
    for bytes in [
        &b""[..],
        b"n",
        b"GET / HTTP/1.1\r\n\r\n",
        &[0; 64],
        &[0xff; 100_000],
        &call[..7],
    ] {
        send(bytes, &mut reply);
        assert_eq!(reply, b"", "{bytes:?}");
    }
    // Many that say nothing, some of them still open when others are served.
    let silent: Vec<_> = (0..50)
        .map(|_| UnixStream::connect(ControllerSocket::path(&dir)).unwrap())
        .collect();
    File::create(dir.join("go")).unwrap();
    program.succeeds();
    drop(silent);
    assert_clean(&dir);
}
