//! Guards against records that stop their own cleaning, and against records that have the wrong things deleted: cut
//! off, full of garbage, replaced by links, or open to others.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use netmcore_pmanage::log::{DAMAGED_NAME, RECORD_NAME};
use netmcore_pmanage::record::{self, Damage, Operation, Tail};
use netmcore_pmanage::{Distrust, Error, KernelObject, Liveness, Log, Recovery, Unlinked, recover};
use netmcore_sys::error::Errno;
use netmcore_sys::name::ObjectName;
use netmcore_sys::record::ObjectKind;
use netmcore_sys::shm::Access;
use netmcore_sys::{sem, shm};
use tempfile::TempDir;

const JOURNAL_NAME: &str = "netplex.pmanage.journal";
const DRAFT_NAME: &str = "netplex.pmanage.draft";

fn directory() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

fn write_record(dir: &Path, text: &[u8]) {
    fs::write(dir.join(RECORD_NAME), text).unwrap();
}

fn read_record(dir: &Path) -> Vec<u8> {
    fs::read(dir.join(RECORD_NAME)).unwrap()
}

fn clean(dir: &Path) -> Recovery {
    let lock = Liveness::acquire(dir).unwrap();
    recover(dir, &lock).unwrap()
}

fn unique(prefix: &str) -> ObjectName {
    ObjectName::unique(prefix.as_bytes()).unwrap()
}

fn create(object: &KernelObject) {
    match object {
        KernelObject::File(path) => drop(File::create_new(path).unwrap()),
        KernelObject::PosixShm(name) => drop(shm::create(name, 0o600).unwrap()),
        KernelObject::PosixSem(name) => drop(sem::NamedSem::create(name, 1, 0o600).unwrap()),
        KernelObject::SemContainer(_) => {}
    }
}

fn exists(object: &KernelObject) -> bool {
    match object {
        KernelObject::File(path) => fs::symlink_metadata(path).is_ok(),
        KernelObject::PosixShm(name) => shm::open(name, Access::ReadOnly).is_ok(),
        KernelObject::PosixSem(name) => sem::NamedSem::open(name).is_ok(),
        KernelObject::SemContainer(_) => false,
    }
}

/// One object of each kind, the files in `dir`.
fn some_of_each_kind(dir: &Path) -> Vec<KernelObject> {
    vec![
        KernelObject::File(dir.join("plain")),
        KernelObject::File(dir.join("odd \"name\"\\\n\t\u{e9}")),
        KernelObject::PosixShm(unique("/nmc damage \"shm\"\u{e9}")),
        KernelObject::PosixSem(unique("/nmc\ndamage\\sem")),
        KernelObject::SemContainer(unique("/nmc-damage-cont").as_bytes().to_vec()),
    ]
}

/// All that can be seen of a directory: names, modes, contents.
fn snapshot(dir: &Path) -> BTreeSet<(PathBuf, u32, Vec<u8>)> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            let contents = if metadata.is_file() {
                fs::read(&path).unwrap()
            } else if metadata.is_symlink() {
                fs::read_link(&path).unwrap().as_os_str().as_bytes().into()
            } else {
                Vec::new()
            };
            (path, metadata.mode(), contents)
        })
        .collect()
}

fn names_in(dir: &Path) -> BTreeSet<String> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect()
}

fn names<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.into_iter().map(str::to_owned).collect()
}

#[test]
fn record_cut_at_any_byte_has_its_whole_lines_cleaned_and_nothing_else() {
    let dir = directory();
    let dir = dir.path();
    let objects = some_of_each_kind(dir);
    let mut text = Vec::new();
    let mut ends = Vec::new();
    for object in &objects {
        record::encode(Operation::Register, object, &mut text);
        ends.push(text.len());
    }
    for cut in 0..=text.len() {
        objects.iter().for_each(create);
        write_record(dir, &text[..cut]);
        let recovery = clean(dir);
        for (object, &end) in objects.iter().zip(&ends) {
            // A line counts without its LF, too.
            let is_whole = cut + 1 >= end;
            let is_real = !matches!(object, KernelObject::SemContainer(_));
            assert_eq!(
                exists(object),
                is_real && !is_whole,
                "{object}, cut at {cut}"
            );
            assert_eq!(recovery.deleted.contains(object), is_real && is_whole);
            object.unlink().unwrap();
        }
        let is_between_lines = cut == 0 || ends.contains(&cut) || ends.contains(&(cut + 1));
        assert_eq!(recovery.torn_tail.is_none(), is_between_lines, "{cut}");
        assert_eq!(recovery.damaged, []);
        assert_eq!(recovery.kept, []);
        assert_eq!(read_record(dir), b"");
        recovery.into_result().unwrap();
    }
    assert_eq!(names_in(dir), names([RECORD_NAME, "netplex.lock"]));
}

#[test]
fn garbage_lines_are_reported_by_number_kept_aside_and_stop_nothing() {
    let dir = directory();
    let dir = dir.path();
    let objects = some_of_each_kind(dir);
    objects.iter().for_each(create);
    let bystander = dir.join("bystander");
    File::create(&bystander).unwrap();

    let garbage: [Vec<u8>; 5] = [
        b"hello".to_vec(),
        b"R FILE \"/no end".to_vec(),
        b"\0\xff\x80 \"\"".to_vec(),
        format!("R FILE \"{}/../bystander\"", dir.join("x").display()).into_bytes(),
        format!("X FILE \"{}\"", bystander.display()).into_bytes(),
    ];
    let mut text = Vec::new();
    for (object, garbage) in objects.iter().zip(&garbage) {
        record::encode(Operation::Register, object, &mut text);
        text.extend_from_slice(garbage);
        text.push(b'\n');
    }
    write_record(dir, &text);

    let recovery = clean(dir);
    let lines: Vec<usize> = recovery.damaged.iter().map(|d| d.line).collect();
    assert_eq!(lines, [2, 4, 6, 8, 10]);
    assert!(matches!(recovery.damaged[3].reason, Damage::Name(_)));
    assert_eq!(recovery.deleted.len(), 4);
    assert!(!objects.iter().any(exists));
    assert!(bystander.exists());
    assert_eq!(recovery.damaged_copy, Some(dir.join(DAMAGED_NAME)));
    let copy = [garbage.join(&b'\n'), b"\n".to_vec()].concat();
    assert_eq!(fs::read(dir.join(DAMAGED_NAME)).unwrap(), copy);
    assert_eq!(read_record(dir), b"");
    assert!(
        matches!(recovery.into_result(), Err(Error::Damaged { damaged, .. }) if damaged.line == 2)
    );

    // Nothing is reported twice, and the copy is for ever.
    assert_eq!(clean(dir).damaged, []);
    write_record(dir, b"hello\nagain\n");
    assert_eq!(clean(dir).damaged.len(), 2);
    let copy = [copy, b"again\n".to_vec()].concat();
    assert_eq!(fs::read(dir.join(DAMAGED_NAME)).unwrap(), copy);
    assert_eq!(
        names_in(dir),
        names([RECORD_NAME, DAMAGED_NAME, "netplex.lock", "bystander"])
    );
}

#[test]
fn what_cannot_be_unlinked_stays_in_the_record_until_it_can() {
    let dir = directory();
    let dir = dir.path();
    let stubborn = dir.join("stubborn");
    fs::create_dir(&stubborn).unwrap();
    fs::write(stubborn.join("inside"), "kept").unwrap();
    let stubborn = KernelObject::File(stubborn);
    let foreign = KernelObject::File("/proc/version".into());
    let looped = dir.join("loop");
    symlink(&looped, &looped).unwrap();
    let obscured = KernelObject::File(looped.join("x"));
    let objects = some_of_each_kind(dir);
    objects.iter().for_each(create);

    let log = Log::open(dir).unwrap();
    log.register(std::slice::from_ref(&stubborn)).unwrap();
    log.register(&objects).unwrap();
    log.register(&[foreign.clone(), obscured.clone()]).unwrap();
    let recovery = clean(dir);
    assert!(!objects.iter().any(exists));
    let kept: BTreeSet<KernelObject> = recovery.kept.iter().map(|(o, _)| o.clone()).collect();
    let expected = BTreeSet::from([stubborn.clone(), foreign.clone(), obscured.clone()]);
    assert_eq!(kept, expected);
    assert!(
        recovery
            .kept
            .iter()
            .any(|(o, e)| *o == stubborn && e.errno == Errno::EISDIR)
    );
    assert!(
        recovery
            .kept
            .iter()
            .any(|(o, e)| *o == obscured && e.errno == Errno::ELOOP)
    );
    assert_eq!(read_record(dir), record::compact(&expected));
    assert_eq!(fs::read(dir.join("stubborn/inside")).unwrap(), b"kept");
    let Err(Error::Unlink { objects }) = recovery.into_result() else {
        panic!("not an error")
    };
    assert_eq!(objects.len(), 3);

    // Cleaning again changes nothing, the in-run form neither.
    assert_eq!(clean(dir).kept.len(), 3);
    assert_eq!(log.unlink_all().unwrap().kept.len(), 3);
    assert!(matches!(
        log.unlink_this(&stubborn),
        Err(Error::Unlink { .. })
    ));
    assert_eq!(log.registered().unwrap().len(), 3);

    log.unregister(&[foreign, obscured]).unwrap();
    fs::remove_file(&looped).unwrap();
    fs::remove_dir_all(dir.join("stubborn")).unwrap();
    fs::write(dir.join("stubborn"), "a file now").unwrap();
    assert_eq!(clean(dir).deleted, [stubborn]);
    assert_eq!(names_in(dir), names([RECORD_NAME, "netplex.lock"]));
    assert_eq!(read_record(dir), b"");
}

#[test]
fn recorded_link_is_removed_itself() {
    let dir = directory();
    let dir = dir.path();
    let target = dir.join("target");
    fs::write(&target, "kept").unwrap();
    symlink(&target, dir.join("to-file")).unwrap();
    symlink("/etc", dir.join("to-directory")).unwrap();
    symlink("/nowhere", dir.join("dangling")).unwrap();
    let links = ["to-file", "to-directory", "dangling"].map(|n| KernelObject::File(dir.join(n)));
    let log = Log::open(dir).unwrap();
    log.register(&links).unwrap();
    assert_eq!(clean(dir).deleted.len(), 3);
    assert_eq!(fs::read(&target).unwrap(), b"kept");
    assert!(!links.iter().any(exists));
    assert!(Path::new("/etc").is_dir());
}

/// Every call that reads or writes refuses, with `why`, and changes nothing in `dir`.
#[track_caller]
fn refused(dir: &Path, lock: Option<&Liveness>, log: Option<&Log>, why: &dyn Fn(Distrust) -> bool) {
    let before = snapshot(dir);
    let check = |call: &str, result: Result<(), Error>| match result {
        Err(Error::Untrusted { why: found, .. }) => assert!(why(found), "{call}: {found}"),
        other => panic!("{call}: {other:?}"),
    };
    check("open", Log::open(dir).map(drop));
    if let Some(lock) = lock {
        check("recover", recover(dir, lock).map(drop));
    }
    if let Some(log) = log {
        let object = KernelObject::File("/tmp/x".into());
        check("register", log.register(std::slice::from_ref(&object)));
        check("unregister", log.unregister(&[object]));
        check("registered", log.registered().map(drop));
        check("unlink_all", log.unlink_all().map(drop));
    }
    assert_eq!(snapshot(dir), before);
}

#[test]
fn record_that_others_can_write_is_refused_untouched() {
    let dir = directory();
    let dir = dir.path();
    let victim = dir.join("victim");
    File::create(&victim).unwrap();
    let log = Log::open(dir).unwrap();
    log.register(&[KernelObject::File(victim.clone())]).unwrap();
    let lock = Liveness::acquire(dir).unwrap();
    let record = dir.join(RECORD_NAME);

    for mode in [0o620, 0o602, 0o666] {
        fs::set_permissions(&record, fs::Permissions::from_mode(mode)).unwrap();
        refused(dir, Some(&lock), Some(&log), &|why| {
            why == Distrust::WritableByOthers { mode }
        });
    }
    fs::set_permissions(&record, fs::Permissions::from_mode(0o600)).unwrap();
    for mode in [0o770, 0o707, 0o1777] {
        fs::set_permissions(dir, fs::Permissions::from_mode(mode)).unwrap();
        refused(dir, Some(&lock), Some(&log), &|why| {
            why == Distrust::WritableByOthers { mode }
        });
        assert!(matches!(
            Liveness::acquire(dir),
            Err(Error::Untrusted { .. })
        ));
        assert!(matches!(
            netmcore_pmanage::prepare_directory(dir),
            Err(Error::Untrusted { .. })
        ));
    }
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(victim.exists());
    assert_eq!(recover(dir, &lock).unwrap().deleted.len(), 1);
}

#[test]
fn record_of_another_user_is_refused_untouched() {
    if netmcore_sys::process::effective_uid() != 0 {
        eprintln!("skipped: only root can give files away");
        return;
    }
    let dir = directory();
    let dir = dir.path();
    let log = Log::open(dir).unwrap();
    let victim = dir.join("victim");
    File::create(&victim).unwrap();
    log.register(&[KernelObject::File(victim.clone())]).unwrap();
    let lock = Liveness::acquire(dir).unwrap();
    let is_owner = |why| {
        matches!(
            why,
            Distrust::Owner {
                uid: 12345,
                expected_uid: 0
            }
        )
    };
    chown(dir.join(RECORD_NAME), Some(12345), None).unwrap();
    refused(dir, Some(&lock), Some(&log), &is_owner);
    chown(dir.join(RECORD_NAME), Some(0), None).unwrap();
    chown(dir, Some(12345), None).unwrap();
    refused(dir, Some(&lock), Some(&log), &is_owner);
    drop(lock);
    assert!(matches!(
        Liveness::acquire(dir),
        Err(Error::Untrusted { .. })
    ));
    chown(dir, Some(0), None).unwrap();
    chown(dir.join("netplex.lock"), Some(12345), None).unwrap();
    assert!(matches!(
        Liveness::acquire(dir),
        Err(Error::Untrusted { .. })
    ));
    assert!(victim.exists());
}

#[test]
fn record_that_is_no_regular_file_is_refused_untouched() {
    let elsewhere = directory();
    let target = elsewhere.path().join("target");
    fs::write(&target, "R FILE \"/tmp/x\"\n").unwrap();
    let cases: [(&str, Distrust); 5] = [
        ("link", Distrust::Link),
        ("dangling link", Distrust::Link),
        ("directory", Distrust::NotARegularFile),
        ("pipe", Distrust::NotARegularFile),
        ("socket", Distrust::NotARegularFile),
    ];
    for (case, expected) in cases {
        // The same in the place of the record, and of what stands beside it during a compaction.
        for name in [RECORD_NAME, JOURNAL_NAME, DRAFT_NAME] {
            let dir = directory();
            let dir = dir.path();
            let lock = Liveness::acquire(dir).unwrap();
            let log = Log::open(dir).unwrap();
            let path = dir.join(name);
            let _ = fs::remove_file(&path);
            match case {
                "link" => symlink(&target, &path).unwrap(),
                "dangling link" => symlink("/nowhere/at/all", &path).unwrap(),
                "directory" => fs::create_dir(&path).unwrap(),
                "pipe" => {
                    let made = Command::new("mkfifo").arg(&path).status().unwrap();
                    assert!(made.success());
                }
                _ => drop(std::os::unix::net::UnixListener::bind(&path).unwrap()),
            }
            if name == DRAFT_NAME {
                // A draft matters to recovery only.
                let before = snapshot(dir);
                let refused = recover(dir, &lock);
                assert!(matches!(refused, Err(Error::Untrusted { why, .. }) if why == expected));
                assert_eq!(snapshot(dir), before);
            } else {
                refused(dir, Some(&lock), Some(&log), &|why| why == expected);
            }
        }
    }
    assert_eq!(fs::read(&target).unwrap(), b"R FILE \"/tmp/x\"\n");
}

#[test]
fn directory_that_is_a_link_is_refused() {
    let dir = directory();
    let real = dir.path().join("real");
    let link = dir.path().join("link");
    netmcore_pmanage::prepare_directory(&real).unwrap();
    symlink(&real, &link).unwrap();
    let is_link = |result: Result<(), Error>| {
        matches!(
            result,
            Err(Error::Untrusted {
                why: Distrust::Link,
                ..
            })
        )
    };
    assert!(is_link(netmcore_pmanage::prepare_directory(&link)));
    assert!(is_link(Log::open(&link).map(drop)));
    assert!(is_link(Liveness::acquire(&link).map(drop)));
    // Neither does a slash hide it.
    for hidden in [link.join(""), link.join(".")] {
        assert!(is_link(netmcore_pmanage::prepare_directory(&hidden)));
        assert!(is_link(Log::open(&hidden).map(drop)));
        assert!(is_link(Liveness::acquire(&hidden).map(drop)));
    }
    assert_eq!(names_in(&real), names([]));
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(matches!(
        Log::open(&file),
        Err(Error::Untrusted {
            why: Distrust::NotADirectory,
            ..
        })
    ));
    assert!(matches!(
        Log::open(&dir.path().join("none")),
        Err(Error::Io { .. })
    ));
}

#[test]
fn prepared_directory_and_files_are_for_their_owner_alone() {
    let dir = directory();
    let inner = dir.path().join("sockets");
    netmcore_pmanage::prepare_directory(&inner).unwrap();
    netmcore_pmanage::prepare_directory(&inner).unwrap();
    assert_eq!(fs::metadata(&inner).unwrap().mode() & 0o7777, 0o700);
    Log::open(&inner).unwrap();
    let _lock = Liveness::acquire(&inner).unwrap();
    for name in [RECORD_NAME, "netplex.lock"] {
        assert_eq!(
            fs::metadata(inner.join(name)).unwrap().mode() & 0o7777,
            0o600
        );
    }
}

#[test]
fn torn_tail_is_cut_before_an_append() {
    let dir = directory();
    let dir = dir.path();
    let log = Log::open(dir).unwrap();
    let line = b"R POSIX_SHM \"/a\"\n";
    let added = KernelObject::File("/b".into());
    for cut in 0..=line.len() {
        for padding in [0, 3] {
            let mut text = line.to_vec();
            text.extend_from_slice(&line[..cut]);
            text.resize(text.len() + padding, 0);
            write_record(dir, &text);
            log.register(std::slice::from_ref(&added)).unwrap();
            let whole = if cut + 1 >= line.len() { 2 } else { 1 };
            let expected = [line.repeat(whole), b"R FILE \"/b\"\n".to_vec()].concat();
            assert_eq!(read_record(dir), expected, "cut at {cut}, {padding} NULs");
        }
    }
}

#[test]
fn compaction_is_finished_whatever_the_record_still_says() {
    let dir = directory();
    let dir = dir.path();
    let log = Log::open(dir).unwrap();
    let old = b"R FILE \"/gone\"\nU FILE \"/gone\"\nR FILE \"/kept\"\nR POSIX_SEM \"/kept\"\n";
    let objects = record::parse(old).objects;
    let new = record::compact(&objects);
    for cut in 0..=new.len() {
        fs::write(dir.join(JOURNAL_NAME), &new).unwrap();
        write_record(dir, &new[..cut]);
        assert_eq!(log.contents().unwrap().objects, objects, "{cut}");
        assert_eq!(read_record(dir), new, "{cut}");
        assert_eq!(names_in(dir), names([RECORD_NAME]));
    }
    // Lines that somebody appended meanwhile count, too.
    fs::write(dir.join(JOURNAL_NAME), &new).unwrap();
    write_record(
        dir,
        b"R FILE \"/kept\"\nU POSIX_SEM \"/kept\"\nR FILE \"/late\"\n",
    );
    let expected = record::parse(b"R FILE \"/kept\"\nR FILE \"/late\"\n").objects;
    assert_eq!(log.contents().unwrap().objects, expected);
    // A draft without a journal never happened.
    fs::write(dir.join(DRAFT_NAME), b"R FILE \"/draft\"\n").unwrap();
    assert_eq!(log.contents().unwrap().objects, expected);
    let _ = clean(dir);
    assert_eq!(names_in(dir), names([RECORD_NAME, "netplex.lock"]));
}

#[test]
fn damage_found_while_a_compaction_is_finished_is_kept_and_reported() {
    let dir = directory();
    let dir = dir.path();
    write_record(dir, b"garbage\nR FILE \"/nowhere/a\"\n");
    fs::write(dir.join(JOURNAL_NAME), b"R FILE \"/nowhere/b\"\n").unwrap();
    let recovery = clean(dir);
    assert_eq!(recovery.damaged.len(), 1);
    assert_eq!(recovery.damaged[0].bytes, b"garbage");
    assert_eq!(recovery.absent.len(), 2);
    assert_eq!(fs::read(dir.join(DAMAGED_NAME)).unwrap(), b"garbage\n");
}

#[test]
fn old_record_can_be_kept_and_added_to() {
    let dir = directory();
    let dir = dir.path();
    let left = dir.join("left");
    File::create(&left).unwrap();
    write_record(
        dir,
        record::compact(&BTreeSet::from([KernelObject::File(left.clone())])).as_slice(),
    );
    let _lock = Liveness::acquire(dir).unwrap();
    let log = Log::open(dir).unwrap();
    log.register(&[KernelObject::SemContainer(b"/c".to_vec())])
        .unwrap();
    assert!(left.exists());
    assert_eq!(log.registered().unwrap().len(), 2);
}

#[test]
fn record_in_memory_does_the_same() {
    let dir = directory();
    let dir = dir.path();
    let log = Log::in_memory();
    assert_eq!(log.path(), None);
    let file = KernelObject::File(dir.join("file"));
    let stubborn = KernelObject::File(dir.to_owned());
    log.register(&[file.clone(), stubborn.clone(), file.clone()])
        .unwrap();
    create(&file);
    assert!(
        log.register(&[KernelObject::File("relative".into())])
            .is_err()
    );
    assert_eq!(log.registered().unwrap().len(), 2);
    assert_eq!(log.unlink_this(&file).unwrap(), Unlinked::Removed);
    create(&file);
    log.clone().register(std::slice::from_ref(&file)).unwrap();
    let recovery = log.unlink_all().unwrap();
    assert_eq!(recovery.deleted, [file]);
    assert_eq!(recovery.kept.len(), 1);
    assert_eq!(log.registered().unwrap(), [stubborn]);
    assert_eq!(names_in(dir), names([]));
}

#[test]
fn registering_nothing_or_something_impossible_writes_nothing() {
    let dir = directory();
    let dir = dir.path();
    let log = Log::open(dir).unwrap();
    log.register(&[]).unwrap();
    let good = KernelObject::File("/good".into());
    let long =
        KernelObject::PosixSem(ObjectName::new([b"/".as_slice(), &[b'x'; 254]].concat()).unwrap());
    for bad in [
        KernelObject::File("bad".into()),
        long,
        KernelObject::SemContainer(vec![]),
    ] {
        let refused = log.register(&[good.clone(), bad]);
        assert!(matches!(refused, Err(Error::InvalidName(_))));
    }
    assert_eq!(read_record(dir), b"");
}

#[test]
fn recorder_takes_kinds_and_bytes() {
    use netmcore_sys::record::Recorder;
    let dir = directory();
    let log = Log::open(dir.path()).unwrap();
    let recorder: &dyn Recorder = &log;
    recorder.register(ObjectKind::PosixShm, b"/a").unwrap();
    recorder.register(ObjectKind::SemContainer, b"/c").unwrap();
    recorder.unregister(ObjectKind::PosixShm, b"/a").unwrap();
    let error = recorder
        .register(ObjectKind::PosixSem, b"/a/b")
        .unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    assert_eq!(
        read_record(dir.path()),
        b"R POSIX_SHM \"/a\"\nR SEM_CONT \"/c\"\nU POSIX_SHM \"/a\"\n"
    );
}

#[test]
#[should_panic(expected = "says nothing about")]
fn lock_of_another_directory_is_no_proof() {
    let (a, b) = (directory(), directory());
    let lock = Liveness::acquire(a.path()).unwrap();
    let _ = recover(b.path(), &lock);
}

#[test]
fn text_that_only_looks_whole_is_read_as_far_as_it_goes() {
    let contents = record::parse(b"R FILE \"/a\"\0R FILE \"/b\"\nR FILE \"/c\"\n\0");
    assert_eq!(contents.objects.len(), 1);
    assert_eq!(contents.damaged.len(), 1);
    assert_eq!(contents.tail, Tail::Padded { keep_bytes: 36 });
}

/// Each line was compared with all that had been kept before it: a record that is nothing but garbage kept the next start
/// busy for minutes.
#[test]
fn large_damaged_record_is_cleaned_at_once() {
    const LINE_COUNT: usize = 100_000;
    let temporary = directory();
    let dir = temporary.path();
    let lines = |count| -> String { (0..count).map(|k| format!("garbage {k}\n")).collect() };
    write_record(dir, lines(LINE_COUNT).repeat(2).as_bytes());
    assert_eq!(clean(dir).damaged.len(), 2 * LINE_COUNT);
    let kept = fs::read_to_string(dir.join(DAMAGED_NAME)).unwrap();
    assert!(kept == lines(LINE_COUNT), "each line is kept once");
}
