//! Guards against crash points that do not count, do not kill, or kill the wrong process: every other crash test
//! rests on them. Run with `--features crash-points`.

mod forked;

use forked::{Child, Words};
use netmcore_sys::name::ObjectName;
use netmcore_sys::sem::{self, NamedSem};
use netmcore_sys::{crash, crash_point};

netmcore_forktest::forktests!(
    unarmed_points_do_nothing,
    passes_are_counted_across_processes,
    process_dies_at_its_pass,
    every_pass_can_be_deadly,
    one_of_many_dies,
    only_the_role_counts,
    disarmed_points_do_nothing,
    crash_in_create_leaves_no_semaphore,
);

fn three_points() {
    crash_point!("test.crash.first");
    crash_point!("test.crash.second");
    crash_point!("test.crash.third");
}

fn unarmed_points_do_nothing() {
    three_points();
    assert_eq!(crash::passed(), 0);
    assert_eq!(crash::died_at(), None);
}

fn passes_are_counted_across_processes() {
    crash::arm(None);
    Child::run(three_points).succeeds();
    three_points();
    assert_eq!(crash::passed(), 6);
    assert_eq!(crash::died_at(), None);
    crash::arm(None);
    assert_eq!(crash::passed(), 0);
}

fn process_dies_at_its_pass() {
    let words = Words::new();
    crash::arm(Some(2));
    Child::run(|| {
        crash_point!("test.crash.first");
        words.set(0, 1);
        crash_point!("test.crash.second");
        words.set(0, 2);
    })
    .dies_of(9);
    assert_eq!(words.get(0), 1);
    assert_eq!(crash::passed(), 2);
    assert_eq!(crash::died_at().as_deref(), Some("test.crash.second"));
    // It is a death of one process, not of all that pass later.
    three_points();
}

fn every_pass_can_be_deadly() {
    crash::arm(None);
    Child::run(three_points).succeeds();
    let names: Vec<String> = (1..=crash::passed())
        .map(|pass| {
            crash::arm(Some(pass));
            Child::run(three_points).dies_of(9);
            crash::died_at().unwrap()
        })
        .collect();
    assert_eq!(
        names,
        ["test.crash.first", "test.crash.second", "test.crash.third"]
    );
}

fn one_of_many_dies() {
    let words = Words::new();
    crash::arm(Some(50));
    let children: Vec<Child> = (0..10)
        .map(|_| {
            Child::run(|| {
                while words.get(0) == 0 {
                    std::hint::spin_loop();
                }
                (0..10).for_each(|_| crash_point!("test.crash.race"));
            })
        })
        .collect();
    words.set(0, 1);
    let ends = children.into_iter().map(Child::wait);
    assert_eq!(ends.filter(|end| !end.is_success()).count(), 1);
}

fn only_the_role_counts() {
    crash::arm_role(7, 2);
    Child::run(three_points).succeeds();
    assert_eq!(crash::passed(), 0);
    Child::run(|| {
        crash::set_role(7);
        three_points();
    })
    .dies_of(9);
    assert_eq!(crash::died_at().as_deref(), Some("test.crash.second"));
    crash::arm_role(7, 0);
    crash::set_role(7);
    three_points();
    assert_eq!(crash::passed(), 3);
}

fn disarmed_points_do_nothing() {
    crash::arm(Some(1));
    crash::disarm();
    three_points();
    assert_eq!(crash::passed(), 0);
}

fn crash_in_create_leaves_no_semaphore() {
    let name = ObjectName::unique(b"/netmcore_sys_test_").unwrap();
    // Nobody else makes anything there, and even a file that is no semaphore would be seen.
    forked::mount_tiny_dev_shm();
    let create = || drop(NamedSem::create(&name, 0, 0o600).unwrap());
    crash::arm(None);
    Child::run(create).succeeds();
    sem::unlink(&name).unwrap();
    assert!(crash::passed() > 0);
    for pass in 1..=crash::passed() {
        crash::arm(Some(pass));
        Child::run(create).dies_of(9);
        let left = std::fs::read_dir("/dev/shm").unwrap().count();
        assert_eq!(left, 0, "{:?}", crash::died_at());
    }
}
