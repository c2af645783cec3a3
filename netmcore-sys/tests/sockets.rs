//! Guards against believing what a peer says it is, and against waiting for a peer that was killed.

#[allow(dead_code, reason = "each test file uses its part")]
mod child;

use child::{Child, hear, line, say, soon};
use netmcore_sys::error::Errno;
use netmcore_sys::poll::{self, Epoll, Interest};
use netmcore_sys::process::{self, Pid};
use netmcore_sys::socket::{self, Listener, Received, Sent, SocketError};

netmcore_forktest::forktests!(
    peer_credentials_are_those_of_the_process_that_connected,
    killed_peer_is_seen_as_the_end,
    killed_listener_refuses_connections,
    listener_is_readable_when_somebody_waits,
);

fn peer_credentials_are_those_of_the_process_that_connected() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = Listener::bind(&path).unwrap();
    let this = Pid::this();
    let child = Child::fork(|| {
        let connection = socket::connect(&path).unwrap();
        let peer = socket::peer_credentials(&connection).unwrap();
        assert_eq!(peer.pid, Some(this), "the one who listens");
        hear(&connection);
        0
    });
    assert!(poll::wait_readable(&listener, soon()).unwrap());
    let connection = listener.accept_nonblocking().unwrap().unwrap();
    let peer = socket::peer_credentials(&connection).unwrap();
    assert_eq!(peer.pid, Some(child.pid));
    assert_eq!(peer.uid, process::effective_uid());
    drop(connection);
    child.succeeds();
}

fn killed_peer_is_seen_as_the_end() {
    let (ours, childs) = line();
    let child = Child::fork(|| {
        say(&childs, 9);
        loop {
            hear(&childs);
        }
    });
    drop(childs);
    assert_eq!(hear(&ours), Some(9));
    let epoll = Epoll::new().unwrap();
    epoll.add(&ours, 3, Interest::Read).unwrap();
    child.kill();
    let mut events = Vec::new();
    epoll.wait(&mut events, soon()).unwrap();
    assert!(
        events[0].hung_up && events[0].read_closed && events[0].readable,
        "{events:?}"
    );
    assert_eq!(
        socket::receive_nonblocking(&ours, &mut [0; 4]).unwrap(),
        Received::Closed
    );
    assert_eq!(socket::send_nonblocking(&ours, b"x").unwrap(), Sent::Closed);
}

fn killed_listener_refuses_connections() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let (ours, childs) = line();
    let child = Child::fork(|| {
        let _listener = Listener::bind(&path).unwrap();
        say(&childs, 0);
        loop {
            hear(&childs);
        }
    });
    hear(&ours);
    let waiting = socket::connect(&path).unwrap();
    child.kill();
    assert_eq!(
        socket::receive(&waiting, &mut [0; 4]).unwrap(),
        0,
        "not accepted, and never will be"
    );
    match socket::connect(&path).unwrap_err() {
        SocketError::Sys(error) => assert_eq!(error.errno, Errno::ECONNREFUSED),
        other => panic!("{other}"),
    }
}

fn listener_is_readable_when_somebody_waits() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = Listener::bind(&path).unwrap();
    let epoll = Epoll::new().unwrap();
    epoll.add(&listener, 1, Interest::Read).unwrap();
    let child = Child::fork(|| {
        let connections = [0; 3].map(|_| socket::connect(&path).unwrap());
        connections.iter().for_each(|connection| say(connection, 4));
        0
    });
    let mut accepted = Vec::new();
    while accepted.len() < 3 {
        let mut events = Vec::new();
        epoll.wait(&mut events, soon()).unwrap();
        assert_eq!(events.len(), 1, "after {}", accepted.len());
        while let Some(connection) = listener.accept_nonblocking().unwrap() {
            accepted.push(connection);
        }
    }
    child.succeeds();
    assert!(
        accepted
            .iter()
            .all(|connection| hear(connection) == Some(4))
    );
}
