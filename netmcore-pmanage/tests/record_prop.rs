//! Guards against a record that says something else than what was written to it: properties of the text, and the log
//! against a naive set, with dead writers among its users.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::Write;

use netmcore_pmanage::record::{self, Operation, Tail};
use netmcore_pmanage::{KernelObject, Liveness, Log, recover};
use netmcore_sys::record::ObjectKind;
use proptest::collection::vec;
use proptest::prelude::*;

fn kind() -> impl Strategy<Value = ObjectKind> {
    prop_oneof![
        Just(ObjectKind::File),
        Just(ObjectKind::PosixShm),
        Just(ObjectKind::PosixSem),
        Just(ObjectKind::SemContainer),
    ]
}

/// Any valid object, with any bytes in its name; many are the same.
fn object() -> impl Strategy<Value = KernelObject> {
    let byte = prop_oneof![
        3 => any::<u8>(),
        1 => prop::sample::select(b"\"\\\n\r\t 0nx'RU".to_vec()),
    ];
    let name = prop_oneof![
        2 => vec(byte, 1..12),
        1 => vec(b'a'..b'd', 1..2),
    ];
    (kind(), name).prop_filter_map("an impossible name", |(kind, mut name)| {
        name.insert(0, b'/');
        KernelObject::new(kind, &name).ok()
    })
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![Just(Operation::Register), Just(Operation::Unregister)]
}

/// Bytes with the words of the grammar among them.
fn garbage() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        vec(any::<u8>(), 0..4),
        prop::sample::select(vec![
            "R ",
            "U ",
            "FILE ",
            "POSIX_SHM ",
            "POSIX_SEM ",
            "SEM_CONT ",
            "\"",
            "\"/",
            "\\",
            "\\x4",
            "\\25",
            "\n",
            "\r\n",
            "\0",
            "\"\n",
            "/..",
            " \t",
        ])
        .prop_map(|word| word.as_bytes().to_vec()),
    ];
    vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

/// The name as some other writer might spell it: each byte raw or in any escape that means it.
fn spelled(name: &[u8], choices: &[u8]) -> Vec<u8> {
    let mut text = vec![b'"'];
    for (&byte, choice) in name.iter().zip(choices.iter().cycle()) {
        let is_raw = !matches!(byte, b'"' | b'\\' | b'\n') && choice % 4 == 0;
        let letter = match byte {
            b'\n' => Some(b'n'),
            b'\t' => Some(b't'),
            b'\r' => Some(b'r'),
            8 => Some(b'b'),
            b'"' | b'\\' | b'\'' => Some(byte),
            _ => None,
        };
        match (is_raw, letter, choice % 4) {
            (true, ..) => text.push(byte),
            (false, Some(letter), 1) => text.extend([b'\\', letter]),
            (false, _, 2) => text.extend(format!("\\x{byte:02x}").bytes()),
            (false, _, 3) => text.extend(format!("\\x{byte:02X}").bytes()),
            _ => text.extend(format!("\\{byte:03}").bytes()),
        }
    }
    text.push(b'"');
    text
}

fn keyword(kind: ObjectKind) -> &'static [u8] {
    match kind {
        ObjectKind::File => b"FILE",
        ObjectKind::PosixShm => b"POSIX_SHM",
        ObjectKind::PosixSem => b"POSIX_SEM",
        ObjectKind::SemContainer => b"SEM_CONT",
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_panic_and_name_only_possible_objects(text in garbage()) {
        let contents = record::parse(&text);
        for object in &contents.objects {
            prop_assert!(object.check().is_ok());
        }
        let compact = record::compact(&contents.objects);
        let again = record::parse(&compact);
        prop_assert_eq!(&again.objects, &contents.objects);
        prop_assert_eq!(again.damaged, vec![]);
        prop_assert_eq!(again.tail, Tail::Whole);
    }

    #[test]
    fn lines_behind_garbage_are_read(text in garbage(), object in object()) {
        let mut text = text;
        text.push(b'\n');
        record::encode(Operation::Register, &object, &mut text);
        prop_assert!(record::parse(&text).objects.contains(&object));
    }

    #[test]
    fn what_is_written_is_read(operations in vec((operation(), object()), 0..20)) {
        let mut text = Vec::new();
        let mut naive = BTreeSet::new();
        for (operation, object) in operations {
            record::encode(operation, &object, &mut text);
            match operation {
                Operation::Register => naive.insert(object),
                Operation::Unregister => naive.remove(&object),
            };
        }
        prop_assert!(text.iter().all(|b| matches!(b, b'\n' | b' '..=b'~')));
        let contents = record::parse(&text);
        prop_assert_eq!(contents.objects, naive);
        prop_assert_eq!(contents.damaged, vec![]);
    }

    #[test]
    fn every_spelling_of_a_name_is_read(
        object in object(),
        choices in vec(any::<u8>(), 1..8),
        blanks in vec(prop::sample::select(vec![" ", "\t", "  ", " \t "]), 2),
        end in prop::sample::select(vec!["", "\n", "\r\n", "\r", " \n", "\0\0", "\n\0"]),
    ) {
        let text = [
            b"R",
            blanks[0].as_bytes(),
            keyword(object.kind()),
            blanks[1].as_bytes(),
            &spelled(object.name(), &choices),
            end.as_bytes(),
        ]
        .concat();
        let contents = record::parse(&text);
        prop_assert_eq!(contents.objects, BTreeSet::from([object]), "{}", text.escape_ascii());
    }
}

/// What happens to a record.
#[derive(Clone, Debug)]
enum Event {
    /// One of several users of the log writes.
    Write(usize, Operation, Vec<KernelObject>),
    /// A writer died inside its append, so many bytes into it.
    Torn(Operation, KernelObject, usize),
    /// The disk or a user broke a line.
    Garbage,
    /// The system crashed and left zeroes at the end.
    Zeroes(usize),
    /// All died; the next program starts. What is recorded never existed, or is a directory.
    Restart,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0..3_usize, operation(), vec(object(), 0..4))
            .prop_map(|(user, operation, objects)| Event::Write(user, operation, objects)),
        2 => (operation(), object(), any::<prop::sample::Index>()).prop_map(|(operation, object, at)| {
            let mut text = Vec::new();
            record::encode(operation, &object, &mut text);
            let cut = at.index(text.len() + 1);
            Event::Torn(operation, object, cut)
        }),
        1 => Just(Event::Garbage),
        1 => (1..5_usize).prop_map(Event::Zeroes),
        1 => Just(Event::Restart),
    ]
}

fn apply(set: &mut BTreeSet<KernelObject>, operation: Operation, objects: &[KernelObject]) {
    for object in objects {
        match operation {
            Operation::Register => set.insert(object.clone()),
            Operation::Unregister => set.remove(object),
        };
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn log_matches_a_naive_set(events in vec(event(), 1..30)) {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let users = [Log::open(dir).unwrap(), Log::open(dir).unwrap(), Log::open(dir).unwrap()];
        let memory = Log::in_memory();
        let append = |text: &[u8]| {
            let mut file = OpenOptions::new().append(true).open(users[0].path().unwrap()).unwrap();
            file.write_all(text).unwrap();
        };
        // Nothing in /nowhere exists; the directory itself cannot be unlinked.
        let kept = KernelObject::File(dir.to_owned());
        let place = |object: KernelObject| match object.kind() {
            ObjectKind::File => {
                let mut name = b"/nowhere".to_vec();
                name.extend_from_slice(object.name());
                KernelObject::new(ObjectKind::File, &name).unwrap_or_else(|_| kept.clone())
            }
            // Names that others may have are not for a test to unlink.
            _ => KernelObject::new(ObjectKind::SemContainer, object.name()).unwrap(),
        };
        let mut naive = BTreeSet::new();
        let mut damaged = 0;
        for event in events {
            match event {
                Event::Write(user, operation, objects) => {
                    let mut objects: Vec<_> = objects.into_iter().map(place).collect();
                    if objects.len() == 3 {
                        objects.push(kept.clone());
                    }
                    for log in [&users[user], &memory] {
                        match operation {
                            Operation::Register => log.register(&objects).unwrap(),
                            Operation::Unregister => log.unregister(&objects).unwrap(),
                        }
                    }
                    apply(&mut naive, operation, &objects);
                }
                Event::Torn(operation, object, cut) => {
                    let object = place(object);
                    let mut text = Vec::new();
                    record::encode(operation, &object, &mut text);
                    let cut = cut.min(text.len());
                    // A dead writer had mended the tail before it wrote.
                    users[0].register(&[KernelObject::SemContainer(b"/mend".to_vec())]).unwrap();
                    naive.insert(KernelObject::SemContainer(b"/mend".to_vec()));
                    append(&text[..cut]);
                    if cut + 1 >= text.len() {
                        apply(&mut naive, operation, &[object]);
                    }
                }
                Event::Garbage => {
                    users[1].register(&[KernelObject::SemContainer(b"/mend".to_vec())]).unwrap();
                    naive.insert(KernelObject::SemContainer(b"/mend".to_vec()));
                    append(b"R FILE garbage\n");
                    damaged += 1;
                }
                Event::Zeroes(count) => append(&vec![0; count]),
                Event::Restart => {
                    let lock = Liveness::acquire(dir).unwrap();
                    let recovery = recover(dir, &lock).unwrap();
                    prop_assert_eq!(recovery.damaged.len(), damaged);
                    damaged = 0;
                    let gone: BTreeSet<_> = recovery.absent.iter().cloned().collect();
                    naive.retain(|object| *object == kept);
                    prop_assert!(gone.is_disjoint(&naive));
                    prop_assert_eq!(recovery.kept.len(), naive.len());
                }
            }
            let contents = users[2].contents().unwrap();
            prop_assert_eq!(&contents.objects, &naive);
            prop_assert_eq!(contents.damaged.len(), damaged);
        }
    }

    #[test]
    fn log_in_memory_matches_a_naive_set(events in vec((operation(), vec(object(), 0..4)), 0..30)) {
        let log = Log::in_memory();
        let mut naive = BTreeSet::new();
        for (operation, objects) in events {
            match operation {
                Operation::Register => log.register(&objects).unwrap(),
                Operation::Unregister => log.unregister(&objects).unwrap(),
            }
            apply(&mut naive, operation, &objects);
            let naive: Vec<_> = naive.iter().cloned().collect();
            prop_assert_eq!(log.registered().unwrap(), naive);
        }
    }
}
