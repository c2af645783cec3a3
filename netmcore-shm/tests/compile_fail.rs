//! Guards against values of one process getting into shared memory, and against messages that do not say which value.

/// What must not compile, with the compiler's message; and what must.
///
/// `TRYBUILD=overwrite cargo test -p netmcore-shm --test compile_fail` writes the messages anew.
#[test]
fn what_is_not_shm_safe_is_refused() {
    let cases = trybuild::TestCases::new();
    cases.pass("tests/pass/*.rs");
    cases.compile_fail("tests/fail/*.rs");
}
