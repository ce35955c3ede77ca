//! Multiaddresses as this plane uses them: TCP for itself, `/udp/PORT/quic-v1` for the data plane next to it.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use libp2p::{Multiaddr, multiaddr::Protocol};

/// Addresses kept of one peer, per plane. Hosts with more interfaces than this are reached through these.
pub(super) const MAX_ADDRESSES: usize = 8;

/// The address of the host, if it starts with one.
pub(super) fn ip(address: &Multiaddr) -> Option<IpAddr> {
    match address.iter().next()? {
        Protocol::Ip4(ip) => Some(ip.into()),
        Protocol::Ip6(ip) => Some(ip.into()),
        _ => None,
    }
}

/// The name of the host, if it starts with one.
pub(super) fn host_name(address: &Multiaddr) -> Option<String> {
    match address.iter().next()? {
        Protocol::Dns(name) | Protocol::Dns4(name) | Protocol::Dns6(name) => Some(name.into_owned()),
        _ => None,
    }
}

/// The same address with `ip` in the place of the host's name.
pub(super) fn with_ip(address: &Multiaddr, ip: IpAddr) -> Multiaddr {
    std::iter::once(Protocol::from(ip)).chain(address.iter().skip(1)).collect()
}

/// The peer at the end of the address, if it names one.
pub(super) fn peer(address: &Multiaddr) -> Option<libp2p::PeerId> {
    match address.iter().last()? {
        Protocol::P2p(peer) => Some(peer),
        _ => None,
    }
}

/// Whether this is an address that the control plane can dial: host, TCP port, perhaps a peer.
pub(super) fn is_control(address: &Multiaddr) -> bool {
    let parts: Vec<_> = address.iter().collect();
    let host = ip(address).is_some() || host_name(address).is_some();
    host && match &parts[1..] {
        [Protocol::Tcp(port)] | [Protocol::Tcp(port), Protocol::P2p(_)] => *port != 0,
        _ => false,
    }
}

/// Whether the control plane can listen there: an address of a host, and a TCP port, which may be 0.
pub(super) fn is_listener(address: &Multiaddr) -> bool {
    let parts: Vec<_> = address.iter().collect();
    matches!(parts[..], [Protocol::Ip4(_) | Protocol::Ip6(_), Protocol::Tcp(_)])
}

/// How the address of a data plane is written where libp2p wants a multiaddress.
pub(super) fn from_data(address: SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Udp(address.port())).with(Protocol::QuicV1)
}

/// The address of a data plane, if it is one.
pub(super) fn to_data(address: &Multiaddr) -> Option<SocketAddr> {
    let mut parts = address.iter();
    let ip = match parts.next()? {
        Protocol::Ip4(ip) => ip.into(),
        Protocol::Ip6(ip) => ip.into(),
        _ => return None,
    };
    match (parts.next()?, parts.next()?, parts.next()) {
        (Protocol::Udp(port), Protocol::QuicV1, None) if port != 0 => Some(SocketAddr::new(ip, port)),
        _ => None,
    }
}

/// What a peer that is connected from `remote` says of its addresses, sorted into control and data. Its loopback
/// addresses mean something to a peer on the same machine only; to others they would be our own.
pub(super) fn sort(told: &[Multiaddr], remote: Option<IpAddr>) -> (BTreeSet<Multiaddr>, BTreeSet<SocketAddr>) {
    let near = remote.is_some_and(|ip| ip.to_canonical().is_loopback());
    let useful = |address: &&Multiaddr| {
        ip(address).is_some_and(|ip| !ip.is_unspecified() && (near || !ip.to_canonical().is_loopback()))
    };
    let told = || told.iter().filter(useful);
    let control = told().filter(|address| is_control(address)).take(MAX_ADDRESSES).cloned().collect();
    let data = told().filter_map(to_data).take(MAX_ADDRESSES).collect();
    (control, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Multiaddr {
        text.parse().unwrap()
    }

    #[test]
    fn data_addresses_round_trip() {
        for text in ["127.0.0.1:4802", "[2001:db8::1]:1"] {
            let address = text.parse().unwrap();
            assert_eq!(to_data(&from_data(address)), Some(address));
        }
        for text in ["/ip4/1.2.3.4/tcp/1", "/ip4/1.2.3.4/udp/0/quic-v1", "/dns4/a/udp/1/quic-v1", "/ip4/1.2.3.4"] {
            assert_eq!(to_data(&parse(text)), None, "{text}");
        }
    }

    #[test]
    fn control_addresses_are_tcp() {
        let peer_id = libp2p::PeerId::random();
        for text in ["/ip4/1.2.3.4/tcp/1", "/dns4/seeds.example/tcp/4801", &format!("/ip6/::1/tcp/2/p2p/{peer_id}")] {
            assert!(is_control(&parse(text)), "{text}");
        }
        for text in ["/ip4/1.2.3.4/udp/1", "/tcp/1", "/ip4/1.2.3.4/tcp/0", "/ip4/1.2.3.4/tcp/1/ws", "/ip4/1.2.3.4"] {
            assert!(!is_control(&parse(text)), "{text}");
        }
        assert!(!is_control(&Multiaddr::empty()) && !is_listener(&Multiaddr::empty()));
        assert!(is_listener(&parse("/ip6/::/tcp/0")) && !is_listener(&parse("/dns/a/tcp/1")));
        let named = parse(&format!("/dns/seeds/tcp/1/p2p/{peer_id}"));
        assert_eq!(host_name(&named).as_deref(), Some("seeds"));
        assert_eq!(peer(&named), Some(peer_id));
        assert_eq!(with_ip(&named, IpAddr::from([1, 2, 3, 4])), parse(&format!("/ip4/1.2.3.4/tcp/1/p2p/{peer_id}")));
    }

    #[test]
    fn loopback_counts_between_neighbours_only() {
        let told: Vec<_> =
            ["/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/udp/2/quic-v1", "/ip4/10.0.0.1/udp/2/quic-v1", "/dns/x/tcp/1"]
                .map(parse)
                .into();
        let (control, data) = sort(&told, Some(IpAddr::from([127, 0, 0, 1])));
        assert_eq!((control.len(), data.len()), (1, 2));
        let (control, data) = sort(&told, Some(IpAddr::from([10, 0, 0, 1])));
        assert_eq!((control.len(), data), (0, [SocketAddr::from(([10, 0, 0, 1], 2))].into()));
    }

    #[test]
    fn a_talkative_peer_is_cut_short() {
        let told: Vec<_> = (1..1000u16).map(|port| parse(&format!("/ip4/10.0.0.1/tcp/{port}"))).collect();
        assert_eq!(sort(&told, None).0.len(), MAX_ADDRESSES);
    }
}
