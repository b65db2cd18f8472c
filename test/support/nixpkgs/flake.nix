# In place of nixpkgs, where there is none: enough for every output of our flake to be evaluated, with packages that are
# but their names, and builders that keep what they are told.
{
  outputs =
    { self }:
    let
      # What builders are told may be anything that a derivation's attribute can be.
      make =
        system: attributes:
        let
          given = removeAttrs attributes [ "meta" ];
          derived = derivation (
            given
            // {
              inherit system;
              name = attributes.name or "${attributes.pname}-${attributes.version}";
              builder = "/bin/sh";
            }
          );
        in
        derived
        // attributes
        // {
          overrideAttrs =
            change: make system (attributes // change (attributes // { nativeBuildInputs = [ ]; }));
        };
      on =
        system:
        let
          make' = make system;
          program =
            name:
            make' {
              inherit name;
              meta.mainProgram = name;
            };
          programs = builtins.listToAttrs (
            map
              (name: {
                inherit name;
                value = program name;
              })
              [
                "caddy"
                "cargo"
                "clippy"
                "bash"
                "coreutils"
                "curl"
                "haproxy"
                "iproute2"
                "jq"
                "nginx"
                "nix"
                "nixfmt-tree"
                "openssl"
                "pkg-config"
                "rustc"
                "rustfmt"
                "shellcheck"
                "shellcheck-minimal"
                "systemd"
                "util-linux"
                "websocat"
              ]
          );
          pkgs = programs // {
            inherit (self) lib;
            inherit pkgs;
            pkgsStatic = pkgs;
            prometheus.cli = program "promtool";
            callPackage =
              file: arguments:
              let
                function = import file;
              in
              function (builtins.intersectAttrs (builtins.functionArgs function) pkgs // arguments);
            rustPlatform.buildRustPackage =
              attributes:
              assert builtins.pathExists attributes.cargoLock.lockFile;
              make' (removeAttrs attributes [ "cargoLock" ] // { inherit (attributes) meta; });
            stdenv = {
              cc = program "cc";
              shellDryRun = "bash -n";
            };
            writeShellApplication =
              {
                name,
                text,
                runtimeInputs ? [ ],
                checkPhase ? "",
                meta ? { },
              }:
              make' {
                inherit
                  name
                  text
                  runtimeInputs
                  checkPhase
                  ;
                meta = {
                  mainProgram = name;
                }
                // meta;
              };
            glibc.static = program "glibc-static";
            mkShell =
              { packages, buildInputs }:
              make' {
                name = "shell";
                inherit packages buildInputs;
              };
            writeText = name: text: make' { inherit name text; };
            testers.runNixOSTest =
              test:
              let
                value = if builtins.isPath test then import test else test;
              in
              make' {
                inherit
                  (value {
                    inherit pkgs;
                    inherit (self) lib;
                  })
                  name
                  testScript
                  ;
              };
          };
        in
        pkgs;
    in
    {
      lib = import ./lib;
      legacyPackages = builtins.listToAttrs (
        map
          (system: {
            name = system;
            value = on system;
          })
          [
            "x86_64-linux"
            "aarch64-linux"
            "x86_64-darwin"
            "aarch64-darwin"
          ]
      );
    };
}
